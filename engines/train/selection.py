"""Whether a validation is better than those before it, and what follows: best.pt, a lower rate, an early stop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dataio.core.errors import UserError
from dataio.shards.shard_set import ShardSet
from engines.config.detector import Config


@dataclass
class Patience:
    """Counts validations in a row that did not improve (lower is better).

    Counts as torch.optim.lr_scheduler.ReduceLROnPlateau does with threshold_mode "rel".

    Attributes:
        threshold: the least relative improvement that counts.
        best: the best score so far. waited: validations since.
    """

    threshold: float
    best: float = math.inf
    waited: int = 0

    def update(self, score: float) -> None:
        """Count one validation."""
        if score < self.best * (1 - self.threshold):
            self.best, self.waited = score, 0
        else:
            self.waited += 1


def check_validation_exists(config: Config, train_set: ShardSet, val_set: ShardSet | None) -> None:
    """Check that what waits for a validation gets one.

    Raises:
        UserError: there is no validation split, or it has no real/fake error and that selects.
    """
    if val_set is not None and val_set.missing_class and config.checkpoint.best == "real_fake_error":
        raise UserError(
            f"checkpoint.best real_fake_error: {val_set.folder} has no {val_set.missing_class} in its val split, so "
            "there is none; choose generator_error or loss, or shard both"
        )
    for key, is_set in (
        ("optim.schedule plateau", config.optim.schedule == "plateau"),
        ("train.early_stop", config.train.early_stop > 0),
    ):
        if is_set and val_set is None:
            raise UserError(
                f"{key}: watches validation, and {train_set.folder} has no val split; "
                "shard with --val-fraction above 0, or choose another schedule"
            )


class SelectionUpdate(NamedTuple):
    """What a validation changed: whether its weights are the best, whether the learning rate was cut."""

    is_best: bool
    rate_cut: bool


class ModelSelection:
    """Compares validations by the metric of `checkpoint.best`; lower is better.

    The plateau schedule and early stopping have their own thresholds and counts, and best.pt
    takes every improvement, so each keeps its own best score.

    Args:
        config: the run's. steps_per_epoch: of the training split.

    Attributes:
        best: {"score", "step", "metric"} of the weights in best.pt; {} before the first.
        cuts: how often the plateau schedule has cut the learning rate.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self.metric = config.checkpoint.best
        self.best: dict[str, Any] = {}
        self.cuts = 0
        self.plateau = Patience(config.optim.plateau_threshold)
        self.early_stop = Patience(config.train.early_stop_threshold)
        self._cut_after = config.optim.plateau_patience if config.optim.schedule == "plateau" else None
        self._stop_after = config.train.early_stop
        self._ignored_steps = config.train.early_stop_after * steps_per_epoch

    def score_of(self, metrics: Mapping[str, float | None], step: int) -> float:
        """A validation's score; without a validation split, later weights are better."""
        score = metrics.get(self.metric)
        if score is None:  # joint and object error need known objects; every validation has a loss
            score = metrics.get("loss")
        return -float(step) if score is None else score

    def update(self, score: float, step: int) -> SelectionUpdate:
        """Take in the score of the weights after `step` steps."""
        is_best = not self.best or score < self.best["score"]
        if is_best:
            self.best = {"score": score, "step": step, "metric": self.metric}
        rate_cut = False
        if self._cut_after is not None:
            self.plateau.update(score)
            rate_cut = self.plateau.waited > self._cut_after
            if rate_cut:
                self.plateau.waited, self.cuts = 0, self.cuts + 1
        if step > self._ignored_steps:
            self.early_stop.update(score)
        return SelectionUpdate(is_best, rate_cut)

    @property
    def early_stopped(self) -> bool:
        """Whether early stopping has waited long enough."""
        return 0 < self._stop_after <= self.early_stop.waited

    def state(self) -> dict[str, Any]:
        """Plain values, as checkpoints hold them."""
        return {
            "best": dict(self.best),
            "cuts": self.cuts,
            "plateau": vars(self.plateau).copy(),
            "patience": vars(self.early_stop).copy(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`; the first checkpoints have `best` only."""
        self.best = dict(state.get("best", {}))
        self.cuts = state.get("cuts", 0)
        vars(self.plateau).update(state.get("plateau", {}))
        vars(self.early_stop).update(state.get("patience", {}))
