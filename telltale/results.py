"""The answers of a detector, one for each image."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ImagePrediction:
    """The answer for one image: a row of `telltale predict`, with the same numbers.

    Attributes:
        path: as given, or folder/name, or zip/member; "image[3]" for the fourth image of a
            call that was no path.
        verdict: "real", "AI-generated" or "unsure"; None where the image could not be read.
        p_fake: probability that the image is generated, calibrated where `calibrated`.
        generator: the likeliest generator; "nature" for photographs.
        p_generator: probability of that generator, never calibrated.
        object: the likeliest object; None for a detector without objects.
        error: why the image could not be read; None where it could.
        calibrated: whether `p_fake` and `verdict` follow a calibration; without one the
            verdict is "AI-generated" from `p_fake` 0.5 on.
        credentials: what the file claims about its own origin (C2PA, IPTC); not part of the score.
        warning: what is odd about a file that was predicted, such as bytes that a strict decoder
            does not expect, or transparency that the detector does not see; None for nothing.
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


class Predictions(Sequence[ImagePrediction]):
    """The answers of one call, in the order of the images.

    Examples:
        >>> rows = Predictions([ImagePrediction("a.png", verdict="real", p_fake=0.02)])
        >>> rows[0].verdict
        'real'
        >>> rows.to_dataframe().loc[0, "p_fake"]
        np.float64(0.02)
    """

    def __init__(self, rows: Iterable[ImagePrediction]) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> ImagePrediction: ...

    @overload
    def __getitem__(self, index: slice) -> "Predictions": ...

    def __getitem__(self, index: int | slice) -> "ImagePrediction | Predictions":
        return Predictions(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Predictions) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(self._rows)

    def __repr__(self) -> str:
        return f"Predictions({list(self._rows)!r})"

    def to_dataframe(self) -> "pd.DataFrame":
        """A row for each image, a column for each field of `ImagePrediction`."""
        import pandas as pd

        names = [field.name for field in fields(ImagePrediction)]
        return pd.DataFrame([[getattr(row, name) for name in names] for row in self], columns=names)
