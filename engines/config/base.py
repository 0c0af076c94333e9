"""Configuration that every kind of run has."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class RunConfig:
    """The run and its folder."""

    dir: str = "runs/default"
    """Folder of the run: config, metrics, checkpoints, weights."""
    seed: int = 0
    """Seed of the initial weights, the order and the augmentation."""


def check_duration(epochs: float, steps: int) -> None:
    """Raise a ValueError unless `train.epochs` or `train.steps` gives a run at least one step."""
    if steps < 0 or (steps == 0 and epochs <= 0):
        raise ValueError("train.epochs must be above 0, or train.steps at least 1")


def check_checkpoints(every: int, keep: int) -> None:
    """Raise a ValueError for an impossible `checkpoint.every` or `checkpoint.keep`."""
    if every < 0 or keep < 1:
        raise ValueError("checkpoint.every must be 0 or more and checkpoint.keep at least 1")
