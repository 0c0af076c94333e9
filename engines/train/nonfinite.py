"""Loss or gradient that is not finite: detected on all ranks, masked, reported, counted."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataio.core.atomic import write_text
from dataio.core.log import log
from engines.config.detector import TrainConfig
from engines.runtime.command import NonFiniteError

DUMP = "nonfinite.json"
# fp16's gradients overflow occasionally, and the scaler then halves its scale. At this scale an
# overflow is the gradient's own.
SMALLEST_SCALE = 1.0


@dataclass(frozen=True)
class BadStep:
    """A step whose loss or gradient was not finite.

    Attributes:
        step: steps done before it. norms: the 2-norm of each parameter's gradient.
        skipped: how many steps the run has skipped by now.
    """

    step: int
    norms: dict[str, float]
    skipped: int


class NonFinite:
    """Decides on the device which updates are masked; the host reads the result when it can wait.

    With `train.nonfinite` stop, the first bad step and all after it are masked until the host
    reads it. With skip only bad steps are, until there are more than `train.nonfinite_cap`.

    Args:
        config: the loop's. device: of the gradients.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.skips, self.cap = config.nonfinite == "skip", config.nonfinite_cap
        # The first bad step that the host has not read, -1 if none.
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._norms = torch.zeros(0, device=device)
        self._names: list[str] = []

    def update_mask(
        self, bad: torch.Tensor, step: int, norms: torch.Tensor, names: list[str]
    ) -> torch.Tensor:
        """Whether this step's update is masked, bool []; never waits for the device.

        Args:
            bad: bool [], equal on all ranks. step: steps done. norms: float32 [P], of the gradients
                of the parameters `names`.
        """
        first = bad & (self._step < 0)
        self._step = torch.where(first, step, self._step)
        if self._names != names:
            self._names, self._norms = names, torch.zeros_like(norms)
        self._norms = torch.where(first, norms, self._norms)
        if not self.skips:
            return self._step >= 0
        over = self._skipped > self.cap
        self._skipped = self._skipped + (bad & ~over)
        return bad | over

    def pop_bad_step(self) -> BadStep | None:
        """The first bad step since the last call; waits for the device."""
        step = int(self._step.item())
        if step < 0:
            return None
        if self.skips:
            self._step.fill_(-1)
        return BadStep(step, dict(zip(self._names, self._norms.tolist(), strict=True)), self.skipped)

    @property
    def skipped(self) -> int:
        """Steps skipped since the run began; waits for the device."""
        return int(self._skipped.item())

    def restore(self, skipped: int) -> None:
        """Continue a run that has skipped so many steps."""
        self._skipped.fill_(skipped)
        self._step.fill_(-1)

    def report(self, bad_step: BadStep, ids: list[int], *, warn: bool) -> None:
        """Raise where the run must stop; else print a warning if `warn`.

        Raises:
            NonFiniteError: the run must stop.
        """
        shown = f"Sample ids of the step: {', '.join(map(str, ids[:8]))}, ... ({len(ids)} in all)"
        what = f"step {bad_step.step + 1}: the loss or its gradient is not finite"
        advice = (
            f"Lower optim.lr, set optim.clip, or check these images; {DUMP} in the run's folder has the norms"
        )
        if not self.skips:
            raise NonFiniteError(f"{what}; nothing was updated since. {shown}. {advice}")
        if bad_step.skipped > self.cap:
            raise NonFiniteError(
                f"{what}, and {bad_step.skipped} steps were not, more than train.nonfinite_cap {self.cap}. "
                f"{shown}. {advice}"
            )
        if warn:
            count = f"{bad_step.skipped} of at most {self.cap} so far"
            log.warning(f"{what}; skipped ({count}). {shown}")


def is_bad(norm: torch.Tensor, losses: torch.Tensor, scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Whether a step must not count, bool [] on the device.

    The all-reduced gradient is the same everywhere: one rank's NaN is seen by all.

    Args:
        norm: of the gradient, float [], and losses: sums, float [...]; both over all ranks.
    """
    bad = ~torch.isfinite(norm)
    if not scaler.is_enabled():
        return bad
    # get_scale would wait for the device.
    scale = scaler._get_scale_async()
    assert scale is not None
    # fp16's gradients may overflow as long as the scaler can still lower its scale.
    return ~torch.isfinite(losses).all() | (bad & (scale <= SMALLEST_SCALE))


def mask_update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, masked: torch.Tensor) -> None:
    """Let the fused optimizer skip its update where `masked` (bool []) is true on the device.

    It skips where found_inf is not zero.
    """
    if scaler.is_enabled():
        for found_inf in scaler._found_inf_per_device(optimizer).values():
            found_inf.copy_(torch.maximum(found_inf, masked.float()))
    else:
        optimizer.found_inf = masked.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]


def write_dump(
    folder: Path,
    bad_step: BadStep,
    ids: list[int],
    weights: list[tuple[str, torch.Tensor]],
    scale: float,
) -> None:
    """Write RUN/nonfinite.json, for finding the cause.

    Args:
        ids: sample ids of the step. weights: named parameters as they are now; a masked update
            changes none. scale: of fp16's loss, 1 without.
    """
    norms = torch.stack(torch._foreach_norm([tensor.detach() for _, tensor in weights])).tolist()
    content = {
        "step": bad_step.step + 1,
        "sample_ids": ids,
        "skipped": bad_step.skipped,
        "loss_scale": scale,
        "gradient_norms": {name: _plain(norm) for name, norm in bad_step.norms.items()},
        "weight_norms": {name: _plain(norm) for (name, _), norm in zip(weights, norms, strict=True)},
    }
    write_text(folder / DUMP, json.dumps(content, indent=1) + "\n")


def _plain(value: float) -> Any:
    """NaN and infinity as strings, which JSON lacks."""
    return value if math.isfinite(value) else str(value)
