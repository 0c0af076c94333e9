"""A configuration as plain values: dicts for checkpoints, YAML, flat keys, and what changed between two."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dataio.core.errors import UserError

# Keys that may change between a run and its continuation without changing its result
# (on the data side: the folder may move, its content may not; see Trainer).
FREE_KEYS = frozenset(
    [
        "resume",
        "run.dir",
        "data.shards",
        "data.threads",
        "data.prefetch",
        "data.hw_decoder_load",
        "data.verify",
        "data.cache_dir",
        "data.cache_gib",
        "data.remote_patience",
        "data.damaged",
        "data.damaged_cap",
        "data.require_audit",
        "data.allow_one_class",
        "data.synthetic.images",
        "data.synthetic.size",
        "data.synthetic.seed",
        "model.weights",
        "model.whiten",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.background",
        # Until a step is not finite they change nothing; then a stopped run may go on with skip.
        "train.nonfinite",
        "train.nonfinite_cap",
        "train.pass_images",
        "train.graph",
        "train.profile",
        "train.timeout",
        "log.every",
        "log.images",
        "log.wandb",
        "log.project",
        "log.group",
        "log.artifacts",
        "log.tensorboard",
    ]
)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars, as YAML and checkpoints hold them."""
    return plain(asdict(config))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} to {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def changed_keys(
    stored: dict[str, Any], current: Any, free: frozenset[str] = FREE_KEYS
) -> list[tuple[str, Any, Any]]:
    """(key, stored value, current value) of the keys whose change would change the result."""
    # A key that a newer version added had its default's effect before.
    old = {**flatten(to_dict(type(current)())), **flatten(stored)}
    new = flatten(to_dict(current))
    return [(key, old[key], new.get(key)) for key in old if key not in free and old[key] != new.get(key)]


def refuse_changed_keys(stored: dict[str, Any], current: Any, free: frozenset[str] = FREE_KEYS) -> None:
    """Check that a continuation has the configuration of the run's start.

    Raises:
        UserError: a key that is not `free` has another value; names the first ones.
    """
    changes = changed_keys(stored, current, free)
    if changes:
        (key, old, new), *others = changes
        more = f" (and {len(others)} more: {', '.join(name for name, *_ in others[:5])})" if others else ""
        kept = Path(current.run.dir) / "config.yaml"
        continues = (
            f"--config {kept} without flags for these continues it as it was"
            if kept.is_file()
            else "use the old value"
        )
        raise UserError(
            f"{key} is {new!r}, but this run was started with {old!r}{more}: that would change its result; "
            f"{continues}, or give another run.dir"
        )


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)
