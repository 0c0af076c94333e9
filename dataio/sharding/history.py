"""The JPEG history of a data set, found by looking into a sample of its files."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from dataio.images.opening import quiet_pillow
from dataio.images.stored import PNG_SIGNATURE, jpeg_history, stored_lossless
from dataio.layouts.base import SPLITS, Layout

HISTORY_SAMPLE = 20_000  # JPEGs whose headers are read
_MOST_LOOKED_AT = 4 * HISTORY_SAMPLE  # files that are opened to find them
_CLEAR_GAP = 0.05  # of two shares, which a detector could learn from


@dataclass
class _Sample:
    """What a sample holds.

    Attributes:
        jpegs: {"quality:subsampling": count}.
        lossless, lossy, foreign: files of (photographs, fakes); foreign ones are lossy, but not JPEG.
    """

    jpegs: Counter[str] = field(default_factory=Counter)
    lossless: list[int] = field(default_factory=lambda: [0, 0])
    lossy: list[int] = field(default_factory=lambda: [0, 0])
    foreign: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def total(self) -> list[int]:
        return [a + b for a, b in zip(self.lossless, self.lossy, strict=True)]


def find_history(
    layout: Layout, lines: Callable[[str], Iterator[tuple[str, str]]], rank: Callable[[str], bytes]
) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """Look into the training images in the order of their ranks, and into the others where none is a JPEG.

    It ends at HISTORY_SAMPLE JPEGs or four times as many files. Files are judged by their content.

    Args:
        lines: from a split to the (path, generator) of its images, in the order of their ranks.
        rank: from a path to its rank.

    Returns:
        {"quality:subsampling": count} of the JPEGs, None where there is none; and notes on what
        the codec policy cannot hide.
    """
    found = sample = _look(layout, lines("train"))
    if not found.jpegs:
        others = [lines(split) for split in SPLITS if split != "train"]
        found = _look(layout, heapq.merge(*others, key=lambda line: rank(line[0])))
    history = dict(sorted(found.jpegs.items())) or None
    return history, tuple(_notes(sample if any(sample.total) else found, history is not None))


@quiet_pillow()
def _look(layout: Layout, lines: Iterable[tuple[str, str]]) -> _Sample:
    sample, photographs, jpegs = _Sample(), layout.generators[0], 0
    for path, generator in islice(lines, _MOST_LOOKED_AT):
        try:
            data = layout.source.head(path, len(PNG_SIGNATURE))
            if data != PNG_SIGNATURE:
                data = layout.read(path)  # a TIFF's directory, for one, may be anywhere
            lossless = stored_lossless(data)
        except OSError:
            continue
        if lossless is None:
            continue
        fake = int(generator != photographs)
        (sample.lossless if lossless else sample.lossy)[fake] += 1
        if lossless:
            continue
        if history := jpeg_history(data):
            sample.jpegs[history] += 1
            jpegs += 1
            if jpegs == HISTORY_SAMPLE:
                break
        else:
            sample.foreign[fake] += 1
    return sample


def _notes(sample: _Sample, has_history: bool) -> Iterator[str]:
    (real, fake), (real_total, fake_total) = sample.lossless, sample.total
    if not real_total or not fake_total:
        return
    if not has_history and fake and not real:
        yield (
            "fakes are stored losslessly and photographs with loss, none of them as JPEG (WebP or AVIF, say): "
            "the codec policy cannot give fakes such a history, so a detector can learn the photographs' "
            "compression in place of their content. Use the photographs' original JPEGs, or store both alike"
        )
    elif not has_history and fake:
        yield (
            "no image is a JPEG, so there is no JPEG history to give to fakes: if photographs were JPEGs "
            "before they were stored losslessly, their traces distinguish them from fakes that never were. "
            "Use the photographs' original files if there are any"
        )
    elif real == real_total and not fake:
        yield (
            "photographs are stored losslessly and fakes with loss: photographs get the fakes' JPEG history "
            "where fakes are JPEGs, and keep none otherwise. Check with `telltale audit` that the format does "
            "not give the class away"
        )
    shares = [count / total for count, total in zip(sample.foreign, sample.total, strict=True)]
    if has_history and abs(shares[0] - shares[1]) > _CLEAR_GAP:
        yield (
            f"{shares[0]:.0%} of the photographs and {shares[1]:.0%} of the fakes are stored with loss in another "
            "format than JPEG (WebP or AVIF, say): the codec policy matches JPEG's history only, so a detector "
            "can learn that compression in place of the content. Store both alike"
        )
