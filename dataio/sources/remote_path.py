"""Files behind a URL (`s3://`, `gs://`, `az://`, `hf://`, `https://`), read through fsspec.

Every request is tried again with exponential backoff until nothing has been answered for
`patience` seconds. What cannot get better by waiting (a missing file, a refused key) fails at
once. Errors are OSErrors that carry the URL, as those of local files carry the path.

fsspec and what it needs for a protocol are imported when a URL is first read.
"""

import errno
import functools
import importlib.util
import io
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dataio.core.errors import UserError, one_line
from dataio.core.log import log

PATIENCE = 300.0  # seconds; below the watchdog's 10 minutes, so that the reason is said first
PART = 4 << 20  # bytes of one request
_REQUESTS = 4  # at a time: one connection to an object store is slow
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds
_TIMEOUTS = (10, 60)  # seconds: to connect, and between bytes

# The extra that a protocol needs, and the module that shows whether it is there.
EXTRAS = {
    "s3": ("s3", "s3fs"),
    "gs": ("gcs", "gcsfs"),
    "az": ("azure", "adlfs"),
    "hf": ("hub", "huggingface_hub"),
    "https": ("http", "aiohttp"),
    "http": ("http", "aiohttp"),
}
_REFUSED = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "TokenRetrieval", "ParamValidation")
_PASSING = (408, 425, 429)  # of 400 to 499: HTTP statuses that waiting may cure

Answer = TypeVar("Answer")


class Unanswered(OSError):
    """A server gave no usable answer for as long as patience lasts; strerror is the reason."""


class RemotePath:
    """A folder or file behind a URL, with the methods of `pathlib.Path` that shards need.

    Args:
        url: without query. patience: seconds without any answer after which a request fails.

    Raises:
        UserError: the protocol is unknown, its extra is not installed, or the URL has a query.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self._url, self.patience = url.rstrip("/"), patience
        self.protocol = url.partition("://")[0]
        if self.protocol not in EXTRAS:
            known = ", ".join(f"{name}://" for name in EXTRAS)
            raise UserError(f"{url}: unknown kind of URL, expected {known} or a folder")
        if "?" in url or "#" in url:
            raise UserError(f"{url}: has a query; give the folder's plain URL and credentials by environment")
        extra, module = EXTRAS[self.protocol]
        if not _is_installed(module):
            raise UserError(
                f"{url}: reading {self.protocol}:// needs {module}: pip install 'telltale[{extra}]'"
            )

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self._url}/{name}", self.patience)

    @property
    def suffix(self) -> str:
        return Path(self._url).suffix

    def with_suffix(self, suffix: str) -> "RemotePath":
        stem = self._url[: len(self._url) - len(self.suffix)]
        return RemotePath(stem + suffix, self.patience)

    def is_file(self) -> bool:
        """Whether a file is there and may be read.

        Raises:
            UserError: nobody says.
        """

        def get(fs: Any) -> bool:
            fs.invalidate_cache()
            return bool(fs.info(self._url).get("type") != "directory")

        try:
            return self._retried(get)
        except (FileNotFoundError, PermissionError):
            return False  # S3 refuses to say that a file is missing to those who may not list
        except OSError as error:
            raise UserError(f"{self._url}: cannot be read ({error.strerror})") from None

    def is_dir(self) -> bool:
        return False  # object stores have no folders, only names that begin alike

    def read_bytes(self) -> bytes:
        """The file's content.

        Raises:
            FileNotFoundError: it is not there. OSError: it cannot be read.
        """
        return self._retried(lambda fs: bytes(fs.cat_file(self._url)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The file's content as text; see `read_bytes`."""
        return self.read_bytes().decode(encoding)

    def read_range(self, offset: int, size: int, given_up: Callable[[], bool] = lambda: False) -> bytes:
        """Bytes offset..offset+size-1, or as many as the file has.

        Args:
            given_up: whether nobody waits for them any more.

        Raises:
            FileNotFoundError: the file is not there. OSError: it cannot be read.
        """

        def get(fs: Any) -> bytes:
            data = bytes(fs.cat_file(self._url, start=offset, end=offset + size))
            # A server without ranges sends the whole file.
            return data[offset : offset + size] if len(data) > size else data

        return self._retried(get, given_up) if size else b""

    def parts(self, size: int) -> Iterator[bytes]:
        """The content of a file of `size` bytes, in order; some parts are fetched ahead, side by side.

        Raises:
            FileNotFoundError: the file is not there.
            OSError: it cannot be read, or is shorter.
        """
        over, begin = threading.Event(), min(PART, size)
        # The first alone: a server that knows no ranges would send the whole file for each.
        first = self._retried(lambda fs: bytes(fs.cat_file(self._url, start=0, end=begin))) if size else b""
        if len(first) > begin:
            yield first
            return
        self._check_part(first, begin, 0)
        yield first
        fetches: deque[_Fetch] = deque()
        try:
            while begin < size or fetches:
                while begin < size and len(fetches) < _REQUESTS:
                    length = min(PART, size - begin)
                    fetches.append(_Fetch(self, begin, length, over))
                    begin += length
                fetch = fetches.popleft()
                data = fetch.result()
                self._check_part(data, fetch.size, fetch.offset)
                yield data
        finally:
            over.set()

    def _check_part(self, data: bytes, size: int, offset: int) -> None:
        if len(data) < size:
            raise OSError(errno.EIO, f"ends at byte {offset + len(data)}: truncated or changed", self._url)

    def sizes(self) -> dict[str, int] | None:
        """Bytes of the files in this folder by their names; None where nothing is listed (http, no right to).

        Raises:
            OSError: nobody says.
        """
        if self.protocol in ("http", "https"):
            return None

        def get(fs: Any) -> dict[str, int]:
            fs.invalidate_cache()
            entries = fs.ls(self._url, detail=True)
            return {str(entry["name"]).rpartition("/")[2]: int(entry["size"] or 0) for entry in entries}

        try:
            return self._retried(get)
        except PermissionError:
            return None

    def open(self, mode: str = "rb") -> "RemoteFile":
        """The file for reading here and there; `mode` is "rb"."""
        assert mode == "rb"
        return RemoteFile(self)

    def _retried(self, get: Callable[[Any], Answer], given_up: Callable[[], bool] = lambda: False) -> Answer:
        pause, began, said = _FIRST_PAUSE, time.monotonic(), False
        while True:
            try:
                answer = get(_file_system(self.protocol))
            except Exception as error:  # each library has exceptions of its own
                _raise_if_lasting(error, self._url)
                reason = one_line(error)[:300] or type(error).__name__
                if given_up() or time.monotonic() - began + pause > self.patience:
                    raise Unanswered(
                        errno.EIO, f"no answer for {self.patience:g} s, last {reason}", self._url
                    ) from None
            else:
                if said:
                    log.info(f"{self._url}: answers again")
                return answer
            if not said and pause > 2 * _FIRST_PAUSE:  # a single failure is nothing to tell
                said = True
                log.warning(f"{self._url}: tried again for up to {self.patience:g} s ({reason})")
            time.sleep(pause * random.uniform(0.5, 1.0))  # processes that failed together come back apart
            pause = min(2 * pause, _LONGEST_PAUSE)


class _Fetch(threading.Thread):
    """One part of a file on its way. A daemon: a process that ends does not wait for a dead server."""

    def __init__(self, path: RemotePath, offset: int, size: int, over: threading.Event) -> None:
        super().__init__(name="shard-part", daemon=True)
        self.path, self.offset, self.size, self._over = path, offset, size, over
        self._data = b""
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._data = self.path.read_range(self.offset, self.size, self._over.is_set)
        except Exception as error:
            self._error = error

    def result(self) -> bytes:
        """The part, once it is there.

        Raises:
            OSError: see `RemotePath.read_range`.
        """
        self.join()
        if self._error is not None:
            raise self._error
        return self._data


class RemoteFile(io.RawIOBase):
    """A remote file that is read by ranges, each a request of its own."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__()
        self._path, self._at = path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise OSError(errno.EINVAL, "only from the start")
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        data = self._path.read_range(self._at, size)
        self._at += len(data)
        return data


AnyPath = Path | RemotePath


def place_of(folder: "str | Path | RemotePath", patience: float = PATIENCE) -> AnyPath:
    """A local path, or a remote one for a URL.

    Raises:
        UserError: see `RemotePath`.
    """
    if isinstance(folder, RemotePath):
        return folder
    return RemotePath(str(folder), patience) if is_url(folder) else Path(folder)


def is_url(folder: object) -> bool:
    return isinstance(folder, RemotePath) or (isinstance(folder, str) and "://" in folder)


def upload_command(url: str, folder: str = "DIR") -> str:
    """A command line that copies a local folder of shards to a URL."""
    protocol, _, rest = url.rstrip("/").partition("://")
    if protocol == "s3":
        return (
            f"aws s3 sync {folder} {url} --exclude manifest.json && aws s3 cp {folder}/manifest.json {url}/"
        )
    if protocol == "hf" and rest.startswith("datasets/"):
        _, user, name, *inside = [*rest.split("/"), ""]
        return f"hf upload {user}/{name} {folder} {'/'.join(inside).strip('/') or '.'} --repo-type dataset"
    place = f"REMOTE:{rest}"
    return (
        f"rclone copy {folder} {place} --exclude /manifest.json && rclone copy {folder}/manifest.json {place}"
    )


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


_systems: dict[str, Any] = {}
_systems_lock = threading.Lock()


def _file_system(protocol: str) -> Any:
    """The file system of fsspec, one of a process; all of them may be used by several threads."""
    with _systems_lock:
        if protocol not in _systems:
            _systems[protocol] = _open_system(protocol)
        return _systems[protocol]


def _open_system(protocol: str) -> Any:
    import fsspec

    connect, read = _TIMEOUTS
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=read)
        return fsspec.filesystem(protocol, client_kwargs={"timeout": timeout})
    if protocol == "s3":
        # Retries inside of retries would multiply with ours.
        once = {"connect_timeout": connect, "read_timeout": read, "retries": {"total_max_attempts": 1}}
        system = fsspec.filesystem(protocol, config_kwargs=once)
        system.retries = 1
        return system
    return fsspec.filesystem(protocol)


def _raise_if_lasting(error: Exception, url: str) -> None:
    """Raise, as an OSError, what waiting does not cure."""
    if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(errno.ENOENT, "no such file", url) from None
    reason = one_line(error)[:300]
    if isinstance(error, PermissionError):
        raise PermissionError(errno.EACCES, f"access refused ({reason})", url) from None
    if isinstance(error, (UserError, ImportError, TypeError, ValueError, NotImplementedError)):
        raise OSError(errno.EINVAL, reason or type(error).__name__, url) from error
    if any(word in type(error).__name__ for word in _REFUSED):
        raise PermissionError(errno.EACCES, f"access refused ({reason})", url) from None
    status = _http_status(error)
    if status == 416 or (isinstance(error, OSError) and error.errno == errno.EINVAL):  # S3's InvalidRange
        raise OSError(
            errno.EINVAL, f"has not the bytes asked for ({reason}): truncated or changed", url
        ) from None
    if status == 404:
        raise FileNotFoundError(errno.ENOENT, "no such file", url) from None
    if 400 <= status < 500 and status not in _PASSING:
        raise PermissionError(errno.EACCES, f"refused with status {status} ({reason})", url) from None


def _http_status(error: Exception) -> int:
    """The HTTP status behind an error of aiohttp, gcsfs, azure or huggingface_hub; 0 if there is none."""
    places = (error, getattr(error, "response", None))
    for place in places:
        for name in ("status", "status_code", "code"):
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return 0
