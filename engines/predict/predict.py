"""From inputs to rows: what a detector says of each image, as CSV, JSON lines or a table."""

import contextlib
import csv
import io
import json
import re
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from tqdm import tqdm

from dataio.core.atomic import write_with
from dataio.core.errors import UserError, reason_of
from dataio.images.codec import Encoded, Undecodable
from dataio.sources.inputs import Input
from dataio.sources.provenance import read_credentials
from engines.attribution.gradcam import grad_cam, last_convolution, overlay
from engines.predict.detector import Detector, Prediction, to_png

_FORMATS = (".csv", ".jsonl")


@dataclass
class PredictionRow:
    """One line of the output; None where an image could not be read.

    Attributes:
        p_fake: calibrated where `calibrated`. generator: the likeliest, nature among them.
        credentials: what the file says of its own origin; no part of the score.
        maps: what the names of --explain's files begin with.
    """

    path: str
    verdict: str | None = None
    p_fake: float | None = None
    generator: str | None = None
    p_generator: float | None = None
    object: str | None = None
    error: str | None = None
    calibrated: bool | None = None
    credentials: str | None = None
    maps: str | None = None


def predict(
    detector: Detector, inputs: Iterable[Input], *, workers: int, explain: str | None = None
) -> Iterator[PredictionRow]:
    """A row for each input, in order; a few batches are in memory, however many inputs there are.

    Args:
        workers: threads that read and encode. explain: folder for pictures and maps, or None.

    Raises:
        UserError: the maps cannot be written, or this network has none.
    """
    maps = MapWriter(detector, Path(explain)) if explain is not None else None
    number = 0
    with _quiet_pillow(), ThreadPoolExecutor(workers, "prepare") as pool:
        pending: list[tuple[PredictionRow, Encoded | None]] = []
        for one in _ahead(pool, inputs, lambda given: _prepare(detector, given), 2 * detector.batch):
            pending.append(one)
            if len(pending) == detector.batch:
                yield from _rows(detector, pending, maps, number)
                number, pending = number + len(pending), []
        yield from _rows(detector, pending, maps, number)


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Warnings as `open_image` sets them, for all threads at once: their filters are shared."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _ahead(
    pool: ThreadPoolExecutor, items: Iterable[Input], work: Callable[[Input], Any], depth: int
) -> Iterator[Any]:
    """Results of `work` in order, at most `depth` of them ahead."""
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _prepare(detector: Detector, given: Input) -> tuple[PredictionRow, Encoded | None]:
    row = PredictionRow(given.path)
    if given.read is None:
        row.error = given.error
        return row, None
    try:
        source = given.read()
        encoded = detector.prepare(source)
        row.credentials = read_credentials(source) or None
        return row, encoded
    except OSError as error:
        row.error = f"cannot be read ({reason_of(error)})"
    except Undecodable as error:
        row.error = f"not a readable image ({_one_line(str(error))})"
    # Files from anywhere find errors in decoders that nobody knew; one of them stops no run.
    except Exception as error:
        row.error = f"cannot be processed ({type(error).__name__}: {_one_line(str(error))})"
    return row, None


def _rows(
    detector: Detector,
    batch: list[tuple[PredictionRow, Encoded | None]],
    maps: "MapWriter | None",
    first: int,
) -> Iterator[PredictionRow]:
    answers = iter(detector.predict([encoded for _, encoded in batch if encoded is not None]))
    for number, (row, encoded) in enumerate(batch, first + 1):
        if encoded is not None:
            prediction = next(answers)
            if isinstance(prediction, Undecodable):
                row.error, row.credentials = f"not a readable image ({prediction})", None
            else:
                row.verdict, row.p_fake, row.calibrated = (
                    prediction.verdict,
                    prediction.p_fake,
                    prediction.calibrated,
                )
                row.generator, row.p_generator = prediction.generator, prediction.p_generator
                row.object = prediction.object or None
                row.maps = maps.save(number, row.path, prediction) if maps else None
        yield row


class MapWriter:
    """Saves each image as the detector saw it, its Grad-CAM map, and the map over the image.

    The map says where the picture speaks for its verdict; for "AI-generated" where that is unsure.

    Raises:
        UserError: the folder cannot be made, or the network has no map.
    """

    def __init__(self, detector: Detector, folder: Path) -> None:
        self.detector, self.folder = detector, folder
        try:
            last_convolution(detector.model)
        except UserError as error:
            raise UserError(str(error).replace("use --no-cam", "leave out --explain")) from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def save(self, number: int, path: str, prediction: Prediction) -> str:
        """Write NUMBER-NAME-{original,map,overlay}.png; returns what they begin with."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).stem)[:60]
        picture = self.detector.input_picture(prediction)
        heat = grad_cam(self.detector.model, prediction.pixels.clone(), fake=prediction.verdict != "real")
        grey = (heat * 255).round().astype("uint8")
        parts = {"original": picture, "map": grey, "overlay": overlay(picture, heat)}
        try:
            for name, part in parts.items():
                file = self.folder / f"{number:06d}-{stem}-{name}.png"
                write_with(file, partial(_write_bytes, to_png(part)))
        except OSError as error:
            raise self._unwritable(error) from None
        return str(self.folder / f"{number:06d}-{stem}")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"--explain {self.folder}: cannot be written ({reason_of(error)}); choose another")


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


class PredictionCounts:
    """Counts verdicts and errors on their way to the output."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.unreadable = 0
        self.first_error = ""

    def count(self, rows: Iterable[PredictionRow], *, bar: bool) -> Iterator[PredictionRow]:
        """Pass rows on, with a progress bar where that is wanted and a person watches."""
        for row in tqdm(rows, unit="img", disable=not (bar and sys.stderr.isatty()), leave=False):
            if row.verdict is not None:
                self.verdicts[row.verdict] += 1
            else:
                self.unreadable += 1
                self.first_error = self.first_error or f"{printable(row.path)}: {row.error}"
            yield row

    @property
    def read(self) -> int:
        return sum(self.verdicts.values())

    def __str__(self) -> str:
        counts = ", ".join(f"{self.verdicts[v]} {v}" for v in ("real", "AI-generated", "unsure"))
        return f"{self.read + self.unreadable} images: {counts}, {self.unreadable} unreadable"


def check_predictions_path(output: str) -> None:
    """Find out before any work whether `output` has a format and a place.

    Raises:
        UserError: it has not.
    """
    path = Path(output)
    if path.suffix not in _FORMATS:
        raise UserError(f"--output {output}: expected a name that ends in {' or '.join(_FORMATS)}")
    if path.is_dir():
        raise UserError(f"--output {output}: is a folder, expected a file")
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.parent}; make it first")


def write_rows(output: str, rows: Iterable[PredictionRow], *, maps: bool) -> None:
    """Write rows as they come; the file appears when it is complete.

    Args:
        output: FILE.csv or FILE.jsonl. maps: whether there is a column of that name.

    Raises:
        UserError: there are no rows at all, or the file cannot be written.
    """
    names = [field.name for field in fields(PredictionRow) if maps or field.name != "maps"]

    def write(temporary: Path) -> None:
        # File names are bytes: those that are no UTF-8 are written as they are.
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            count = 0
            put = _csv_writer(file, names) if output.endswith(".csv") else _json_writer(file, names)
            for row in rows:
                put(asdict(row))
                count += 1
            if not count:
                raise no_images()

    try:
        write_with(Path(output), write)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({reason_of(error)}); choose another"
        ) from None


def no_images() -> UserError:
    """What is wrong where no path leads to anything."""
    return UserError("no images: the paths given, or the list on standard input, are empty")


def _csv_writer(file: TextIO, names: list[str]) -> Callable[[dict[str, Any]], None]:
    line = io.StringIO(newline="")
    # With its own ending "\r\n" the module quotes a lone "\r" too, which readers take for an end.
    writer = csv.writer(line, lineterminator="\r\n")

    def put_cells(cells: list[Any]) -> None:
        writer.writerow(cells)
        file.write(line.getvalue().removesuffix("\r\n") + "\n")
        line.seek(0)
        line.truncate()

    def put(values: dict[str, Any]) -> None:
        cells = [values[name] for name in names]
        put_cells([str(c).lower() if isinstance(c, bool) else "" if c is None else c for c in cells])

    put_cells(names)
    return put


def _json_writer(file: TextIO, names: list[str]) -> Callable[[dict[str, Any]], None]:
    def put(values: dict[str, Any]) -> None:
        file.write(json.dumps({name: values[name] for name in names}, allow_nan=False) + "\n")

    return put


def print_rows(rows: Iterable[PredictionRow]) -> None:
    """Print a table, line by line as rows come.

    Raises:
        UserError: there are no rows at all.
    """
    count = 0
    for row in rows:
        if not count:
            print(f"{'verdict':<13}{'P(fake)':>8}  {'likeliest generator':<28}path")
        count += 1
        if row.verdict is None:
            line = f"{'-':<13}{'-':>8}  {'-':<28}{printable(row.path)}: {row.error}"
        else:
            generator = f"{row.generator} ({row.p_generator:.3f})"
            extra = [f"object {row.object}"] if row.object else []
            extra += [f"credentials: {row.credentials}"] if row.credentials else []
            extra += [f"maps {row.maps}"] if row.maps else []
            line = f"{row.verdict:<13}{row.p_fake:>8.4f}  {generator:<28}{printable(row.path)}"
            line += f"  [{'; '.join(extra)}]" if extra else ""
        print(line)
    if not count:
        raise no_images()


def printable(text: str) -> str:
    """A file's name without what a terminal would obey: newlines, colours, broken UTF-8."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
