"""Single images for a detector, by the same path as evaluation: codec, DALI, network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataio.codec import CodecPolicy, Undecodable, encode
from dataio.errors import UserError
from dataio.order import centre_boxes
from dataio.pipeline import build_pipeline
from engines.config import Config
from models.dual_head import DualHead


@dataclass(frozen=True)
class Seen:
    """One image as the detector sees it, and what it says.

    Attributes:
        pixels: float32 [1, 3, S, S], normalised. picture: uint8 [S, S, 3], the same to look at.
        p_fake: 1 - P(nature). generator, object: the likeliest names; object "" where none.
        p_generator: of that generator.
    """

    pixels: torch.Tensor
    picture: np.ndarray
    p_fake: float
    generator: str
    p_generator: float
    object: str

    @property
    def verdict(self) -> str:
        return "Fake" if self.p_fake >= 0.5 else "Real"


def prepare(path: str | Path, config: Config, codec: dict[str, Any]) -> torch.Tensor:
    """One file through the codec policy of the training shards and evaluation's crop.

    Returns:
        float32 [1, 3, S, S], normalised, on the CPU.

    Raises:
        UserError: missing or undecodable.
    """
    try:
        source = Path(path).read_bytes()
        encoded = encode(source, CodecPolicy.from_dict(codec))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Undecodable as error:
        raise UserError(f"{path}: not a readable image ({error})") from None
    size = (np.asarray([encoded.width]), np.asarray([encoded.height]))
    boxes, flips = centre_boxes(config.data.eval_crop, *size)
    data = np.frombuffer(encoded.data, np.uint8)
    batch = ([data], [boxes[0, :2]], [boxes[0, 2:]], [flips[0]])
    pipeline = build_pipeline(
        iter([batch]),
        replace(config.data, prefetch=1, threads=1),
        1,
        torch.device("cpu"),
        resample=True,
        pad=False,
        augmented=False,
    )
    (found,) = pipeline.run()
    image = torch.from_numpy(np.array(found.as_array()))
    return image.permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def look(model: DualHead, config: Config, pixels: torch.Tensor) -> Seen:
    """The detector's answer to one prepared image."""
    generator, objects = model(pixels)
    p = generator.double().softmax(1)[0]
    best = int(p.argmax())
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (config.data.mean, config.data.std))
    shown = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    names: Sequence[str] = model.objects
    return Seen(
        pixels=pixels,
        picture=shown[0].permute(1, 2, 0).numpy(),
        p_fake=float(p[1:].sum()),
        generator=model.generators[best],
        p_generator=float(p[best]),
        object=names[int(objects[0].argmax())] if names else "",
    )
