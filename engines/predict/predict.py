"""Predict a stream of images: rows as CSV, as JSON lines or as a table."""

import csv
import io
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dataio.core.atomic import write_with
from dataio.core.errors import UserError, one_line, reason_of, writing
from dataio.images.codec import Encoded
from dataio.images.opening import Undecodable, quiet_pillow
from dataio.sources.inputs import Input
from dataio.sources.provenance import read_credentials
from engines.attribution.gradcam import grad_cam, last_convolution, overlay
from engines.predict.detector import Detector, Prediction, Queued, to_png

_FORMATS = (".csv", ".jsonl")


@dataclass
class PredictionRow:
    """One line of the output; fields are None where an image could not be read.

    Attributes:
        p_fake: calibrated where `calibrated`. generator: the likeliest; may be "nature".
        credentials: the origin that the file's metadata state; not used for the score.
        warning: what is odd about a file that was predicted: see `Encoded`.
        maps: the common prefix of the files that `MapWriter` wrote.
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
    warning: str | None = None
    maps: str | None = None


def predict(
    detector: Detector, inputs: Iterable[Input], *, workers: int, explain: str | None = None
) -> Iterator[PredictionRow]:
    """A row for each input, in order. Memory holds a few batches, whatever the number of inputs.

    On a GPU a batch's rows come when the next batch is queued, so that the device always has work.

    Args:
        workers: threads that read and encode. explain: folder for pictures and maps, or None.

    Raises:
        UserError: the maps cannot be written, or the network has no convolutions to map.
    """
    maps = MapWriter(detector, Path(explain)) if explain is not None else None
    with quiet_pillow(), ThreadPoolExecutor(workers, "prepare") as pool:
        prepared = _ahead(pool, inputs, lambda given: _prepare(detector, given), 2 * detector.batch)
        yield from predict_prepared(detector, prepared, maps, late=detector.device.type == "cuda")


def predict_prepared(
    detector: Detector,
    prepared: Iterable[tuple[PredictionRow, Encoded | None]],
    maps: "MapWriter | None",
    *,
    late: bool,
) -> Iterator[PredictionRow]:
    """The rows with their predictions, in order.

    Args:
        prepared: rows and their images, None where there is an error.
        late: start a batch before the last one's answers are fetched.
    """
    started: deque[tuple[list[tuple[PredictionRow, Encoded | None]], Queued]] = deque()
    prepared, number = iter(prepared), 0
    while True:
        batch = list(islice(prepared, detector.batch))
        if batch:
            started.append((batch, detector.start([encoded for _, encoded in batch if encoded is not None])))
        while len(started) > (late and bool(batch)):
            rows, queued = started.popleft()
            yield from _rows(detector, rows, detector.finish(queued), maps, number)
            number += len(rows)
        if not batch:
            return


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
        row.warning = encoded.warning or None
        return row, encoded
    except OSError as error:
        row.error = f"cannot be read ({reason_of(error)})"
    except Undecodable as error:
        row.error = f"not a readable image ({one_line(error)[:200]})"
    # Arbitrary files trigger unknown decoder errors; one file must not stop the run.
    except Exception as error:
        row.error = f"cannot be processed ({type(error).__name__}: {one_line(error)[:200]})"
    return row, None


def _rows(
    detector: Detector,
    batch: list[tuple[PredictionRow, Encoded | None]],
    predictions: Iterable[Prediction | Undecodable],
    maps: "MapWriter | None",
    first: int,
) -> Iterator[PredictionRow]:
    answers = iter(predictions)
    for number, (row, encoded) in enumerate(batch, first + 1):
        if encoded is not None:
            prediction = next(answers)
            if isinstance(prediction, Undecodable):
                row.error = f"not a readable image ({prediction})"
                row.credentials = row.warning = None
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
    """Saves the network's input for each image, its Grad-CAM map, and the map over the image.

    The map is of the verdict; of "AI-generated" where the verdict is unsure.

    Raises:
        UserError: the folder cannot be made, or the network has no convolutions to map.
    """

    def __init__(self, detector: Detector, folder: Path) -> None:
        self.detector, self.folder = detector, folder
        try:
            last_convolution(detector.model)
        except UserError as error:
            reason = error.message.partition(";")[0]
            raise UserError(f"{reason}; leave it out", field="explain", value=folder) from None
        with writing(folder, field="explain"):
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, number: int, path: str, prediction: Prediction) -> str:
        """Write NUMBER-NAME-{original,map,overlay}.png; returns their common prefix."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).stem)[:60]
        picture = self.detector.input_picture(prediction)
        heat = grad_cam(self.detector.model, prediction.pixels.clone(), fake=prediction.verdict != "real")
        gray = (heat * 255).round().astype("uint8")
        parts = {"original": picture, "map": gray, "overlay": overlay(picture, heat)}
        with writing(self.folder, field="explain"):
            for name, part in parts.items():
                file = self.folder / f"{number:06d}-{stem}-{name}.png"
                write_with(file, partial(_write_bytes, to_png(part)))
        return str(self.folder / f"{number:06d}-{stem}")


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


class PredictionCounts:
    """Counts of verdicts and errors, taken while rows pass to the output."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.unreadable = 0
        self.first_error = ""

    def count(self, rows: Iterable[PredictionRow], *, bar: bool) -> Iterator[PredictionRow]:
        """Count rows and pass them on; `bar` shows progress if standard error is a terminal."""
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


def run_predict(
    detector: Detector, inputs: Iterable[Input], *, workers: int, output: str | None, explain: str | None
) -> PredictionCounts:
    """Predict all inputs into a file, or as a table on standard output.

    Args:
        workers: threads that read and encode. output: FILE.csv, FILE.jsonl or None for a table.
        explain: folder for pictures and maps, or None.

    Raises:
        UserError: see `predict`, `check_predictions_path` and `write_rows`.
    """
    counts = PredictionCounts()
    # A table on the screen is progress enough.
    rows = counts.count(predict(detector, inputs, workers=workers, explain=explain), bar=bool(output))
    if output:
        write_rows(output, rows, maps=bool(explain))
    else:
        print_rows(rows)
    return counts


def check_predictions_path(output: str) -> None:
    """Check the name and the folder of an output file before any work.

    Raises:
        UserError: an unknown suffix, a folder, or a folder that does not exist.
    """
    path = Path(output)
    if path.suffix not in _FORMATS:
        raise UserError(f"expected a name that ends in {' or '.join(_FORMATS)}", field="output", value=output)
    if path.is_dir():
        raise UserError("is a folder, expected a file", field="output", value=output)
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}; make it first", field="output", value=output)


def write_rows(output: str, rows: Iterable[PredictionRow], *, maps: bool) -> None:
    """Write rows as they come; the file appears when it is complete.

    Args:
        output: FILE.csv or FILE.jsonl. maps: whether to write the column `maps`.

    Raises:
        UserError: there are no rows at all, or the file cannot be written.
    """
    names = [field.name for field in fields(PredictionRow) if maps or field.name != "maps"]

    def write(temporary: Path) -> None:
        # File names are bytes; names that are not UTF-8 are written unchanged.
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            count = 0
            put = _csv_writer(file, names) if output.endswith(".csv") else _json_writer(file, names)
            for row in rows:
                put(asdict(row))
                count += 1
            if not count:
                raise no_images()

    with writing(output, field="output"):
        write_with(Path(output), write)


def no_images() -> UserError:
    """The error of a run without any input."""
    return UserError("no images: the paths given, or the list on standard input, are empty")


def _csv_writer(file: TextIO, names: list[str]) -> Callable[[dict[str, Any]], None]:
    line = io.StringIO(newline="")
    # With "\r\n" as its line end the csv module also quotes a lone "\r", which readers take for one.
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
            extra += [f"warning: {row.warning}"] if row.warning else []
            extra += [f"maps {row.maps}"] if row.maps else []
            line = f"{row.verdict:<13}{row.p_fake:>8.4f}  {generator:<28}{printable(row.path)}"
            line += f"  [{'; '.join(extra)}]" if extra else ""
        print(line)
    if not count:
        raise no_images()


def printable(text: str) -> str:
    """Text with control characters (newlines, colors, broken UTF-8) escaped for a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
