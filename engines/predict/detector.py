"""A detector for single images, through evaluation's own path: codec, DALI, network."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataio.core.cores import cores_per_process
from dataio.core.errors import UserError, reason_of
from dataio.core.log import log
from dataio.images.codec import Encoded, encode
from dataio.images.opening import Undecodable
from dataio.loading.crops import center_boxes
from dataio.loading.dali_pipeline import as_images, build_pipeline, pipeline_inputs, run_pipeline
from dataio.loading.pixels import to_pixels
from engines.checkpoint.contract import trained_policy
from engines.checkpoint.load_model import load_model
from engines.evaluate.calibration import load_calibration, uncalibrated_verdict
from engines.evaluate.split_inference import forward
from engines.runtime.inference import HostCopy, inference_batch
from engines.runtime.precision import resolve_precision, set_tf32

_LARGEST_BATCH = 64  # of images whose bytes wait in memory, by default and on a CPU


@dataclass(frozen=True)
class Prediction:
    """The network's input for one image, and its answers.

    Attributes:
        pixels: float32 [1, 3, S, S], normalized, on the detector's device.
        p_fake: 1 - P(nature), calibrated where `calibrated`. verdict: "real", "AI-generated"
            or "unsure".
        generator, object: the likeliest names; the generator may be "nature", object is "" where
            the detector has no object head.
        p_generator: probability of that generator, never calibrated.
    """

    pixels: torch.Tensor
    p_fake: float
    calibrated: bool
    verdict: str
    generator: str
    p_generator: float
    object: str


@dataclass(frozen=True)
class Queued:
    """Images that the network was started on, for `Detector.finish`.

    Attributes:
        answers: P(generator), P(object) on their way; None where `finished` has the results already.
        pixels: float [N, 3, S, S] on the device.
    """

    answers: HostCopy | None
    pixels: torch.Tensor
    finished: Sequence[Prediction | Undecodable] = ()


class Detector:
    """Runs a checkpoint on images in batches, through one DALI pipeline.

    Args:
        checkpoint: RUN, RUN/best.pt or an export. batch: the most images of one call of
            `predict`; by default evaluation's batch, on a CPU at most 64. max_megapixels: of an image;
            by default as in the training shards.

    Raises:
        UserError: what `load_model` and `load_calibration` raise.
    """

    def __init__(
        self, checkpoint: str | Path, batch: int | None = None, max_megapixels: int | None = None
    ) -> None:
        self.model, self.config, info = load_model(checkpoint)
        self.calibration = load_calibration(checkpoint, self.model.state_dict())
        if self.calibration is not None and (how := self.calibration.data.get("codec_differences")):
            log.warning(
                f"{checkpoint}: its calibration was fitted on images of another codec than the training's "
                f"({'; '.join(how)}); calibrate again"
            )
        if "missing_class" in info:
            log.warning(
                f"{checkpoint}: was trained without {info['missing_class']}, so its verdicts say nothing"
            )
        self.policy = trained_policy(info["codec"], checkpoint)
        if max_megapixels is not None:
            self.policy = replace(self.policy, max_megapixels=max_megapixels)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        least = min(4 * self.config.train.micro_batch, _LARGEST_BATCH)
        self.batch = batch or inference_batch(self.config.data.size, least, self.device)
        self._precision = resolve_precision(self.config.train.precision, self.device)
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self._inputs: tuple[Any, ...] = ()
        self._pipeline: Any = None

    def prepare(self, source: bytes) -> Encoded:
        """One file through the codec policy of the training shards; safe in any thread.

        Raises:
            Undecodable: not an image, or one that the policy cannot take.
        """
        return encode(source, self.policy)

    def predict(self, images: Sequence[Encoded]) -> list[Prediction | Undecodable]:
        """Predict at most `batch` prepared images, in their order.

        An image that DALI cannot decode, though Pillow could, gives an `Undecodable` instead.

        Raises:
            UserError: the network's outputs are not finite.
        """
        return self.finish(self.start(images))

    def start(self, images: Sequence[Encoded]) -> Queued:
        """Decode at most `batch` images and start the network on them; on a GPU nothing waits for its answers.

        Raises:
            UserError: what `predict` raises, where an image has to be looked at alone.
        """
        nothing = torch.empty(0)
        if not images:
            return Queued(None, nothing)
        try:
            pixels = self._decode(images)
        except RuntimeError as error:
            # After an undecodable image a pipeline cannot go on, and DALI does not say which it was.
            self._pipeline = None
            if "memory" in str(error):
                raise
            if len(images) > 1:
                return Queued(None, nothing, [p for image in images for p in self.predict([image])])
            return Queued(None, nothing, [Undecodable("DALI cannot decode it")])
        set_tf32(self.config.train.tf32)  # another detector may have been loaded since
        with torch.inference_mode():
            heads = [head.double().softmax(1) for head in forward(self.model, pixels, self._precision)]
        return Queued(HostCopy(heads), pixels)

    def finish(self, queued: Queued) -> list[Prediction | Undecodable]:
        """The predictions of images that `start` was given, in their order.

        Raises:
            UserError: the network's outputs are not finite.
        """
        if queued.answers is None:
            return list(queued.finished)
        generator, objects = (head.numpy() for head in queued.answers.wait())
        return list(self._predictions(queued.pixels, generator, objects))

    def input_picture(self, prediction: Prediction) -> np.ndarray:
        """The network's input as a picture, uint8 [S, S, 3]."""
        return to_pixels(prediction.pixels, self.config.data.mean, self.config.data.std)[0]

    def _decode(self, images: Sequence[Encoded]) -> torch.Tensor:
        """Evaluation's crop of each: float [N, 3, S, S], normalized, channels-last in memory.

        float32; float16 on a GPU that computes in half precision.
        """
        size = (np.asarray([i.width for i in images]), np.asarray([i.height for i in images]))
        boxes, flips = center_boxes(self.config.data.eval_crop, *size)
        self._inputs = pipeline_inputs([np.frombuffer(i.data, np.uint8) for i in images], boxes, flips)
        if self._pipeline is None:
            self._pipeline = build_pipeline(
                self._feed(),
                # No prefetch: the next batch is not known before this one is done.
                replace(
                    self.config.data, prefetch=1, threads=self.config.data.threads or cores_per_process()
                ),
                self.batch,
                self.device,
                resample=True,
                pad=False,
                augmented=False,
                half=self.device.type == "cuda" and self._precision != "fp32",  # as evaluation
            )
        # A copy, since DALI uses its buffer again.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        return as_images(run_pipeline(self._pipeline, stream)).clone()

    def _feed(self) -> Iterator[tuple[Any, ...]]:
        while True:
            yield self._inputs

    def _predictions(
        self, pixels: torch.Tensor, generator: np.ndarray, objects: np.ndarray
    ) -> Iterator[Prediction]:
        if not np.isfinite(generator).all():
            raise UserError("the detector's probabilities are not finite; did the training diverge?")
        p_fake = np.clip(generator[:, 1:].sum(1), 0.0, 1.0)
        if self.calibration is not None:
            p_fake = self.calibration.probability(p_fake)
        verdict = self.calibration.verdict if self.calibration else uncalibrated_verdict
        names, inputs = self.model.objects, pixels.float()
        for number, (p, object_) in enumerate(zip(generator, objects, strict=True)):
            best, probability = int(p.argmax()), float(p_fake[number])
            yield Prediction(
                pixels=inputs[number : number + 1],
                p_fake=probability,
                calibrated=self.calibration is not None,
                verdict=verdict(probability),
                generator=self.model.generators[best],
                p_generator=float(p[best]),
                object=names[int(object_.argmax())] if names else "",
            )


def predict_file(detector: Detector, path: str | Path) -> tuple[Prediction, str]:
    """Read, prepare and predict one file.

    Returns:
        the prediction, and what is odd about the file, "" for nothing.

    Raises:
        UserError: the file is missing or undecodable.
    """
    try:
        encoded = detector.prepare(Path(path).read_bytes())
        (prediction,) = detector.predict([encoded])
        if isinstance(prediction, Undecodable):
            raise prediction
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from None
    except Undecodable as error:
        raise UserError(f"{path}: not a readable image ({error})") from None
    return prediction, encoded.warning


def to_png(picture: np.ndarray) -> bytes:
    """A picture, uint8 [H, W] or [H, W, 3], as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
