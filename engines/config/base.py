"""Configuration that every kind of run has."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class RunConfig:
    """The run and its folder."""

    dir: str = "runs/default"
    """Folder of the run: config, metrics, checkpoints, weights."""
    seed: int = 0
    """Seed of the initial weights, the order and the augmentation."""
