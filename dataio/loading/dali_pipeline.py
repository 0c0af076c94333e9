"""The DALI pipeline: one definition for the CPU and the GPU, without any state of its own."""

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataio.core.cores import cores_per_process
from dataio.images.training_decoder import DECODER_OPTIONS
from dataio.loading import augment

if TYPE_CHECKING:
    from dataio.loading.config import DataConfig

_building = threading.Lock()  # loaders' threads build their own; DALI counts operators without a lock


def pipeline_inputs(
    encoded: Sequence[NDArray[np.uint8]], boxes: NDArray[np.int32], flips: NDArray[np.int32]
) -> tuple[Any, ...]:
    """One batch in the form that the pipeline's source yields, without augmentation parameters.

    Args:
        encoded: the images' bytes, N arrays. boxes: int32 [N, 4] as (y, x, height, width).
        flips: int32 [N].
    """
    # DALI takes dense arrays only.
    start, shape = (np.ascontiguousarray(part) for part in (boxes[:, :2], boxes[:, 2:]))
    return encoded, start, shape, flips


def run_pipeline(pipeline: Any, stream: torch.cuda.Stream | None) -> Any:
    """The pipeline's next batch as a DALI tensor list; on a GPU for use in `stream`."""
    return pipeline.run(stream)[0]


def as_images(batch: Any) -> torch.Tensor:
    """A DALI batch in NHWC as a tensor [N, C, H, W] over the same memory, channels-last.

    DLPack's reference count keeps DALI's buffer alive, but DALI may use it again.
    """
    return torch.from_dlpack(batch.as_tensor()).permute(0, 3, 1, 2)


def build_pipeline(
    source: Iterator[Any],
    config: "DataConfig",
    batch: int,
    device: torch.device,
    *,
    resample: bool,
    pad: bool,
    augmented: bool,
    largest: tuple[int, int] = (0, 0),
    raw: bool = False,
    half: bool = False,
) -> Any:
    """Build the pipeline from encoded bytes to normalized images, float32 HWC.

    Args:
        source: yields (encoded images, box starts, box shapes, flips[, params]) per batch.
        batch: the most samples of a batch.
        resample: boxes may differ in size from the network's input.
        pad: boxes may reach into a border of the mean color.
        augmented: the source yields params, and `config.augment` applies.
        largest: width and height that no image exceeds, pixels; (0, 0): unknown.
        raw: return the decoded boxes, uint8.
        half: round the images to float16.
    """
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import types as dali_types

    types: Any = dali_types  # its members are made at run time, unseen by type checkers

    gpu = device.type == "cuda"
    decoder: dict[str, Any] = {"output_type": types.RGB, **DECODER_OPTIONS}
    if gpu:
        decoder["hw_decoder_load"] = 0.0 if config.deterministic else config.hw_decoder_load
        decoder["jpeg_fancy_upsampling"] = config.deterministic
        # Reserve the hardware decoder's memory for the largest image: growing it later waits for the GPU.
        decoder["preallocate_width_hint"], decoder["preallocate_height_hint"] = largest
    fill = [255.0 * m for m in config.mean]
    kinds = [types.UINT8, types.INT32, types.INT32, types.INT32]
    ranks = [1, 1, 1, 0]
    if augmented:
        kinds, ranks = [*kinds, types.FLOAT], [*ranks, 1]

    @pipeline_def(
        batch_size=batch,
        # Threads wait for each other between operators; one more than cores keeps these busy.
        num_threads=config.threads or cores_per_process() + 1,
        device_id=device.index if gpu else None,
        prefetch_queue_depth=config.prefetch,
        enable_conditionals=augmented,
    )
    def pipeline() -> Any:
        image: Any
        inputs = fn.external_source(source=source, num_outputs=len(kinds), dtype=kinds, ndim=ranks)
        encoded, start, shape, flip = inputs[:4]
        place = "mixed" if gpu else "cpu"
        if pad:
            image = fn.decoders.image(encoded, device=place, **decoder)
            image = fn.slice(
                image, start=start, shape=shape, axes=[0, 1], out_of_bounds_policy="pad", fill_values=fill
            )
        else:
            image = fn.decoders.image_slice(
                encoded, start=start, shape=shape, axes=[0, 1], device=place, **decoder
            )
        if raw:
            return image, flip  # DALI warns of inputs that nothing takes
        if resample:
            image = fn.resize(
                image, size=[config.size, config.size], interp_type=types.INTERP_LINEAR, antialias=True
            )
        if augmented:
            image = augment.rand_augment(image, inputs[4], config.augment, config.size, sum(fill) / 3)
            image = augment.blur_resize_compress(image, inputs[4], config.augment, config.size)
        image = fn.crop_mirror_normalize(
            image,
            mirror=flip,
            dtype=types.FLOAT16 if half else types.FLOAT,
            output_layout="HWC",
            mean=fill,
            std=[255.0 * s for s in config.std],
        )
        if augmented and config.augment.erase > 0:
            image = augment.erase(image, inputs[4])
        return image

    with _building:
        built = pipeline()
        built.build()
    return built
