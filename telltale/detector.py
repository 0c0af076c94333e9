"""A trained detector for images from anywhere: files, memory, one or many."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import islice
from os import PathLike, fspath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataio.core.cores import cores_per_process
from dataio.core.errors import UserError, one_line, reason_of
from dataio.images.codec import Encoded
from dataio.images.opening import Undecodable
from engines.attribution.gradcam import (
    Score,
    generator_score,
    grad_cams,
    object_score,
    overlay,
    verdict_score,
)
from engines.attribution.regions import Region, find_regions
from engines.predict.detector import Detector
from engines.predict.predict import predict
from telltale.images import ImageLike, as_inputs
from telltale.results import ImagePrediction, Predictions

if TYPE_CHECKING:
    from engines.predict.detector import Prediction


def load(path_or_run: str | PathLike[str], *, batch: int | None = None) -> "ImageDetector":
    """Load a detector, onto the first GPU where there is one.

    A calibration beside the checkpoint (`telltale calibrate`) is applied.

    Args:
        path_or_run: a run folder (its best.pt), a checkpoint, or an export (`telltale export`).
        batch: images of one forward pass; None takes the evaluation's, on a CPU at most 64.

    Raises:
        UserError: missing, damaged or foreign files, or a batch below 1.

    Examples:
        >>> import telltale
        >>> detector = telltale.load("runs/quickstart")
        >>> detector.predict("photo.jpg")[0].verdict in ("real", "AI-generated", "unsure")
        True
    """
    if batch is not None and batch < 1:
        raise UserError("expected 1 or more", field="batch", value=batch)
    return ImageDetector(Detector(fspath(path_or_run), batch))


@dataclass(frozen=True, eq=False)
class ImageExplanation:
    """Where an image supports an answer, by Grad-CAM.

    All pictures show the detector's input: the image's center, scaled to S x S pixels.

    Attributes:
        prediction: the answer for the image.
        target: what the map supports: "fake", "real", or the name of a generator or an object.
        heat: float32 [S, S] in [0, 1], divided by its maximum; zero everywhere where nothing
            supports the target.
        regions: boxes of the places that stand out, those with the most heat first.
        picture: the detector's input. overlay: the heat over it.
        layer: the layer of the map, by its name in the backbone.
    """

    prediction: ImagePrediction
    target: str
    heat: NDArray[np.float32]
    regions: tuple[Region, ...]
    picture: Image.Image
    overlay: Image.Image
    layer: str


class ImageDetector:
    """A detector that predicts and explains images; `load` makes one.

    Images go the way of evaluation: the codec policy of the training shards, DALI's decoding
    and crop, the network, the calibration. A JPEG's history of compression is part of what the
    detector sees, so pass a file's path or its bytes where you have them: a PIL image or an
    array counts as losslessly stored. Not safe for several threads at once.

    Attributes:
        generators: names that `generator` can have; the first is "nature", the photographs.
        objects: names that `object` can have; empty for a detector without objects.
        calibrated: whether probabilities and verdicts follow a calibration.
    """

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self.generators = tuple(detector.model.generators)
        self.objects = tuple(detector.model.objects)
        self.calibrated = detector.calibration is not None

    def predict(self, images: ImageLike | Iterable[ImageLike], *, workers: int | None = None) -> Predictions:
        """Predict one image or many.

        Args:
            images: a path, bytes of a file, a PIL image or uint8 [H, W, 3] in RGB; or any number
                of them, or uint8 [N, H, W, 3]. A folder, a zip or a glob gives each of its images.
            workers: threads that read and decode; None takes the cores.

        Returns:
            a row for each image, in order. One that cannot be read has the reason in `error`.

        Raises:
            UserError: a URL, an object that is no image, or a network that answers NaN.

        Examples:
            >>> import numpy as np, telltale
            >>> detector = telltale.load("runs/quickstart")
            >>> rows = detector.predict(["photo.jpg", np.zeros((64, 64, 3), np.uint8)])
            >>> [row.path for row in rows]
            ['photo.jpg', 'image[1]']
            >>> rows.to_dataframe()[["path", "verdict", "p_fake"]].shape
            (2, 3)
        """
        if workers is not None and workers < 1:
            raise UserError("expected 1 or more", field="workers", value=workers)
        names = [field.name for field in fields(ImagePrediction)]
        rows = predict(self._detector, as_inputs(images), workers=workers or cores_per_process())
        return Predictions(ImagePrediction(**{name: getattr(row, name) for name in names}) for row in rows)

    def explain(self, image: ImageLike, target: str = "fake") -> ImageExplanation:
        """Map where an image supports an answer (Grad-CAM; Selvaraju et al., 2017).

        Args:
            image: one image, as for `predict`.
            target: "fake" or "real" (the log-odds of both), or the name of a generator or
                of an object (its logit). A generator goes before an object of the same name.

        Raises:
            UserError: an image that cannot be read, an unknown target, a backbone without
                convolutions.

        Examples:
            >>> import telltale
            >>> explanation = telltale.load("runs/quickstart").explain("photo.jpg", target="fake")
            >>> explanation.overlay.save("overlay.png")
            >>> float(explanation.heat.max()) <= 1
            True
        """
        score = self._score(target)
        path, encoded = self._prepare(image)
        (answer,) = self._detector.predict([encoded])
        if isinstance(answer, Undecodable):
            raise UserError(f"{path}: not a readable image ({answer})")
        maps = grad_cams(self._detector.model, answer.pixels.clone(), score)
        picture = self._detector.input_picture(answer)
        return ImageExplanation(
            prediction=_to_prediction(path, answer, encoded.warning),
            target=target,
            heat=maps.heat[0],
            regions=find_regions(maps.heat[0]),
            picture=Image.fromarray(picture),
            overlay=Image.fromarray(overlay(picture, maps.heat[0])),
            layer=maps.layer,
        )

    def _score(self, target: str) -> Score:
        if target in ("fake", "real"):
            return verdict_score(target == "fake")
        if target in self.generators:
            return generator_score(self._detector.model, target)
        if target in self.objects:
            return object_score(self._detector.model, target)
        known = ["fake", "real", *self.generators, *self.objects]
        names = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise UserError(f"unknown; expected one of {names}", field="target", value=repr(target))

    def _prepare(self, image: ImageLike) -> tuple[str, Encoded]:
        inputs = list(islice(as_inputs(image), 2))
        if len(inputs) != 1:
            raise UserError(f"{'several images' if inputs else 'no image'}: explain takes one at a time")
        given = inputs[0]
        if given.read is None:
            raise UserError(f"{given.path}: {given.error}")
        try:
            return given.path, self._detector.prepare(given.read())
        except OSError as error:
            raise UserError(f"{given.path}: cannot be read ({reason_of(error)})") from None
        except Undecodable as error:
            raise UserError(f"{given.path}: not a readable image ({one_line(error)})") from None


def _to_prediction(path: str, answer: "Prediction", warning: str) -> ImagePrediction:
    return ImagePrediction(
        path=path,
        verdict=answer.verdict,
        p_fake=answer.p_fake,
        generator=answer.generator,
        p_generator=answer.p_generator,
        object=answer.object or None,
        calibrated=answer.calibrated,
        warning=warning or None,
    )
