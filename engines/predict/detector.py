"""Single images for a detector, by the same path as evaluation: codec, DALI, network."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataio.core.errors import UserError
from dataio.images.codec import CodecPolicy, Encoded, Undecodable, encode
from dataio.loading.dali_pipeline import build_pipeline, default_threads
from dataio.loading.order import centre_boxes
from engines.checkpoint.load_model import load_model
from engines.evaluate.calibration import load_calibration, uncalibrated_verdict
from engines.evaluate.split_inference import forward
from engines.runtime.precision import resolve_precision

_LARGEST_BATCH = 64  # of images whose bytes wait in memory, by default


@dataclass(frozen=True)
class Prediction:
    """One image as the detector sees it, and what it says.

    Attributes:
        pixels: float32 [1, 3, S, S], normalised, on the detector's device.
        p_fake: 1 - P(nature), calibrated where `calibrated`. verdict: "real", "AI-generated"
            or "unsure".
        generator, object: the likeliest names, nature among them; object "" where none.
        p_generator: of that generator, never calibrated.
    """

    pixels: torch.Tensor
    p_fake: float
    calibrated: bool
    verdict: str
    generator: str
    p_generator: float
    object: str


class Detector:
    """A checkpoint that looks at images in batches, through one DALI pipeline.

    Args:
        checkpoint: RUN, RUN/best.pt or an export. batch: the most images of one call of
            `predict`; None takes evaluation's, at most 64.

    Raises:
        UserError: what `load_model` and `load_calibration` raise.
    """

    def __init__(self, checkpoint: str | Path, batch: int | None = None) -> None:
        self.model, self.config, info = load_model(checkpoint)
        self.calibration = load_calibration(checkpoint, self.model.state_dict())
        self.policy = CodecPolicy.from_dict(info["codec"])
        self.batch = batch or min(4 * self.config.train.micro_batch, _LARGEST_BATCH)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._precision = resolve_precision(self.config.train.precision, self.device)
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self._next: tuple[Any, ...] = ()
        self._pipeline: Any = None

    def prepare(self, source: bytes) -> Encoded:
        """One file through the codec policy of the training shards; safe in any thread.

        Raises:
            Undecodable: not an image, or one that the policy cannot take.
        """
        return encode(source, self.policy)

    def predict(self, images: Sequence[Encoded]) -> list[Prediction | Undecodable]:
        """What the network says of at most `batch` prepared images, in their order.

        One that DALI cannot decode, though Pillow could, is returned as the reason.

        Raises:
            UserError: the network's answers are NaN.
        """
        if not images:
            return []
        try:
            pixels = self._decode(images)
        except RuntimeError as error:
            # A pipeline that met an undecodable image is dead, and does not say which it was.
            self._pipeline = None
            if "memory" in str(error):
                raise
            if len(images) > 1:
                return [prediction for image in images for prediction in self.predict([image])]
            return [Undecodable("DALI cannot decode it")]
        return list(self._look(pixels))

    def input_picture(self, prediction: Prediction) -> np.ndarray:
        """The network's input to look at, uint8 [S, S, 3]."""
        data = self.config.data
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (data.mean, data.std))
        shown = ((prediction.pixels[0].cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        return shown.permute(1, 2, 0).numpy()

    def _decode(self, images: Sequence[Encoded]) -> torch.Tensor:
        """Evaluation's crop of each: float32 [N, 3, S, S], normalised, channels-last in memory."""
        size = (np.asarray([i.width for i in images]), np.asarray([i.height for i in images]))
        boxes, flips = centre_boxes(self.config.data.eval_crop, *size)
        start, shape = (np.ascontiguousarray(part) for part in (boxes[:, :2], boxes[:, 2:]))
        self._next = ([np.frombuffer(i.data, np.uint8) for i in images], start, shape, flips)
        if self._pipeline is None:
            self._pipeline = build_pipeline(
                self._feed(),
                # No batch ahead: the next one is not known before this one is done.
                replace(self.config.data, prefetch=1, threads=self.config.data.threads or default_threads()),
                self.batch,
                self.device,
                resample=True,
                pad=False,
                augmented=False,
            )
        stream = [torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []
        (found,) = self._pipeline.run(*stream)
        # A copy, since DALI's buffer is used again.
        return torch.from_dlpack(found.as_tensor()).clone().permute(0, 3, 1, 2)

    def _feed(self) -> Iterator[tuple[Any, ...]]:
        while True:
            yield self._next

    def _look(self, pixels: torch.Tensor) -> Iterator[Prediction]:
        with torch.inference_mode():
            generator, objects = (
                head.double().softmax(1).cpu().numpy()
                for head in forward(self.model, pixels, self._precision)
            )
        if not np.isfinite(generator).all():
            raise UserError("the detector's probabilities are no numbers; did the training diverge?")
        p_fake = np.clip(generator[:, 1:].sum(1), 0.0, 1.0)
        if self.calibration is not None:
            p_fake = self.calibration.probability(p_fake)
        verdict = self.calibration.verdict if self.calibration else uncalibrated_verdict
        names = self.model.objects
        for number, (p, object_) in enumerate(zip(generator, objects, strict=True)):
            best, one = int(p.argmax()), float(p_fake[number])
            yield Prediction(
                pixels=pixels[number : number + 1],
                p_fake=one,
                calibrated=self.calibration is not None,
                verdict=verdict(one),
                generator=self.model.generators[best],
                p_generator=float(p[best]),
                object=names[int(object_.argmax())] if names else "",
            )


def predict_file(detector: Detector, path: str | Path) -> Prediction:
    """Read, prepare and look at one file.

    Raises:
        UserError: missing or undecodable.
    """
    try:
        (prediction,) = detector.predict([detector.prepare(Path(path).read_bytes())])
        if isinstance(prediction, Undecodable):
            raise prediction
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Undecodable as error:
        raise UserError(f"{path}: not a readable image ({error})") from None
    return prediction


def to_png(picture: np.ndarray) -> bytes:
    """A picture, uint8 [H, W] or [H, W, 3], as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
