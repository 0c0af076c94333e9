"""How training decodes a file, against how Pillow shows it.

Files whose bytes are kept are decoded by DALI in training. It does not turn pictures upright and
knows fewer variants of the formats than Pillow does, so what is kept must be seen with it first.
"""

import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataio.images.headers import header_fault
from dataio.images.opening import Undecodable, image_orientation, to_rgb, upright
from dataio.images.transparency import Transparency, alpha_of

DECODER_OPTIONS = {"adjust_orientation": False}  # of every decoder that training uses
_LARGEST_DIFFERENCE = 2.0  # of 255, mean over the picture: two decoders round differently

_lock = threading.Lock()
_pipelines: dict[int, Any] = {}  # by process: a forked one cannot use its parent's


def training_pixels(data: bytes) -> NDArray[np.uint8]:
    """Decode a file as training does on the CPU: uint8 [H, W, 3], as stored; safe in any thread.

    Raises:
        Undecodable: DALI cannot decode it.
    """
    # Before DALI sees it: there it could end the process.
    if fault := header_fault(data):
        raise Undecodable(fault)
    with _lock:
        try:
            if os.getpid() not in _pipelines:
                _pipelines[os.getpid()] = _build()
            pipeline = _pipelines[os.getpid()]
            pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8)])
            return np.array(pipeline.run()[0].at(0))
        except RuntimeError:
            _pipelines.pop(os.getpid(), None)  # after an error a pipeline cannot go on
            raise Undecodable("DALI cannot decode it") from None


def _build() -> Any:
    from nvidia.dali import fn, pipeline_def, types  # only where needed: it takes a second

    # One image at a time gains nothing from DALI's own threads; waiting for them takes longer than it.
    alone: dict[str, Any] = {"exec_pipelined": False, "exec_async": False}

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, **alone)
    def pipeline() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        options: dict[str, Any] = {"output_type": types.RGB, **DECODER_OPTIONS}
        return fn.decoders.image(encoded, device="cpu", **options)

    built = pipeline()
    built.build()
    return built


def training_fault(data: bytes, image: Image.Image, transparency: Transparency) -> str:
    """Why training would not see the picture that Pillow shows, upright; "" where it does.

    Args:
        image: `data` as `open_image` gives it. transparency: see `to_rgb`.

    Raises:
        Undecodable: see `to_rgb`.
    """
    orientation = image_orientation(image)
    see_through = transparency == "white" and alpha_of(image) is not None
    expected = np.asarray(to_rgb(upright(image), transparency))
    try:
        shown = training_pixels(data)
    except Undecodable:
        return "the training decoder cannot read it"
    if shown.shape == expected.shape:
        difference = float(np.abs(shown.astype(np.int16) - expected).mean())
        # A dark picture hardly differs from its mirror image, so there nothing is rounding.
        if difference <= (0 if orientation != 1 or see_through else _LARGEST_DIFFERENCE):
            return ""
        shows = f"other pixels (mean difference {difference:.1f} of 255)"
    else:
        shows = f"{shown.shape[1]} x {shown.shape[0]} pixels"
    if orientation != 1:
        return f"the training decoder does not turn it upright (orientation {orientation})"
    if see_through:
        return "the training decoder drops its transparency"
    return f"the training decoder shows {shows}"
