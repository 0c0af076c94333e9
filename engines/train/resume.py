"""What a checkpoint holds, which one a run continues from, and whether it is still the same run."""

from dataclasses import replace
from typing import Any

import torch

from dataio.core.errors import UserError
from dataio.core.log import log
from dataio.loading.loader import resamples
from dataio.shards.manifest import label_mismatch
from dataio.shards.shard_set import ShardSet
from engines.checkpoint import files as checkpoints
from engines.checkpoint.async_saver import snapshot
from engines.checkpoint.contract import codec_differences
from engines.config.detector import Config
from engines.config.values import FREE_KEYS, refuse_changed_keys, to_dict
from engines.runtime.distributed import World
from engines.runtime.precision import resolve_precision
from engines.runtime.run_folder import refuse_to_start_over
from engines.train.schedule import data_fingerprint
from engines.train.trainer import Trainer

HEADER = {"format": checkpoints.FORMAT, "version": checkpoints.VERSION}


def find_state(
    config: Config, world: World, store: checkpoints.CheckpointFolder, *, prepare: bool = True
) -> dict[str, Any] | None:
    """The checkpoint that `config.resume` asks for; None to begin.

    Args:
        prepare: create the folder and remove what killed saves left; false to look only.

    Raises:
        UserError: resume none in a folder with checkpoints; a file that is not one, or has weights only;
            every checkpoint is damaged.
    """
    if world.is_main and prepare:
        store.prepare()
    if config.resume == "none":
        refuse_to_start_over(store.folder, store.steps())
        return None
    if config.resume != "auto":
        state = checkpoints.load(config.resume)
        if "optimizer" not in state:
            raise UserError(
                "has weights only; resume from a file in RUN/checkpoints/",
                field="resume",
                value=config.resume,
            )
        return state

    def warn(text: str) -> None:
        if world.is_main:
            log.warning(text)

    return store.load_newest(warn)


def check_same_run(config: Config, world: World, state: dict[str, Any], train_set: ShardSet) -> None:
    """A continuation must not silently become another run."""
    free = FREE_KEYS
    if not any(resamples(train_set, config.data, train) for train in (True, False)):
        free |= {"data.resident"}  # the same pixels, however they come
    refuse_changed_keys(state["config"], config, free)
    mismatch = label_mismatch(state["labels"], train_set.labels)
    if mismatch:
        raise UserError(
            f"the checkpoint's {mismatch} ({train_set.folder}); use the shards the run was started with or "
            "another run.dir"
        )
    if state["data"] != data_fingerprint(train_set):
        differences = codec_differences(train_set.manifest["codec"], state.get("codec"))
        how = f" ({'; '.join(differences)})" if differences else ""
        raise UserError(
            f"data.shards {train_set.folder}: its training shards are not those the run was started with{how}; "
            "use those or another run.dir"
        )
    precision = resolve_precision(config.train.precision, world.device)
    if state["precision"] != precision:
        raise UserError(
            f"train.precision is {precision} on this machine, the run was started with {state['precision']}; "
            f"add --train.precision {state['precision']}"
        )


def as_begun(config: Config, state: dict[str, Any]) -> Config:
    """The configuration of a continuation: a run that began at random has no initial weights to read."""
    if state["config"].get("model", {}).get("weights"):
        return config
    return replace(config, model=replace(config.model, weights=""))


def weights_file(trainer: Trainer, model_state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The part of a checkpoint that evaluation and prediction need; all of best.pt but its metrics."""
    train_set = trainer.train_set
    return {
        **HEADER,
        "step": trainer.step,
        "model": model_state,
        "labels": {
            "generators": list(train_set.labels.generators),
            "objects": list(train_set.labels.objects),
        },
        "codec": train_set.manifest["codec"],
        "layout": train_set.manifest["layout"],
        **({"missing_class": train_set.missing_class} if train_set.missing_class else {}),
        "config": to_dict(trainer.config),
    }


def checkpoint_state(trainer: Trainer, *, metrics_offset: int, wandb_id: str) -> dict[str, Any]:
    """What a checkpoint holds, copied: training may go on while it is written.

    Args:
        metrics_offset: bytes of metrics.jsonl. wandb_id: of the Weights & Biases run.
    """
    state = trainer.state()
    del state["model"]  # copied once, by cpu_state
    return {
        **weights_file(trainer, checkpoints.cpu_state(trainer.model)),
        **snapshot(state),
        "metrics_offset": metrics_offset,
        "wandb_id": wandb_id,
    }
