"""TensorBoard's copy of a run's metrics, in RUN/tensorboard."""

import contextlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dataio.core.log import log
from engines.runtime.command import SharedError


def check_tensorboard() -> None:
    """Check that TensorBoard can be written here.

    Raises:
        SharedError: its package is not installed.
    """
    if find_spec("tensorboard") is None:
        raise SharedError(
            "log.tensorboard is true, but TensorBoard is not installed; pip install 'telltale[tensorboard]', or leave "
            "it out"
        )


class TensorBoardLog:
    """Event files of one run. No method raises: after a failure all do nothing.

    Args:
        folder: of the run. purge_step: TensorBoard ignores what earlier files have from this step on, as
            the continued run writes it again; None for a new run.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self._writer: Any = None
        with self._failure_as_warning("starting TensorBoard's log"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    @contextlib.contextmanager
    def _failure_as_warning(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning(f"{what} failed ({error}); going on without it")
            self._writer = None

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log what of `values` is a number."""
        if self._writer is None:
            return
        with self._failure_as_warning("logging to TensorBoard"):
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log the image file at `path` as images/NAME."""
        if self._writer is None:
            return
        with self._failure_as_warning("sending an image to TensorBoard"):
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"images/{name}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            with self._failure_as_warning("closing TensorBoard's log"):
                self._writer.close()
