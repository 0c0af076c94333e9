"""Resume a finetuning run, on the same or another number of processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dataio.core.errors import UserError, one_line
from engines.config.mlm import FINETUNE_FREE_KEYS, FinetuneConfig
from engines.config.values import refuse_changed_keys
from engines.mlm.trainer import COMPLETE_FILE
from engines.runtime.run_folder import refuse_to_start_over

PREFIX = "checkpoint-"


def steps_of(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, oldest first."""
    steps = []
    for path in folder.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if number.isdigit() and (path / COMPLETE_FILE).is_file():
            steps.append(int(number))
    return sorted(steps)


def find_checkpoint(config: FinetuneConfig, folder: Path) -> Path | None:
    """The checkpoint that `config.resume` selects, or None to start from the beginning.

    Raises:
        UserError: `resume` is "none" although there are checkpoints, or names a folder that is
            not a complete checkpoint.
    """
    steps = steps_of(folder)
    if config.resume == "none":
        refuse_to_start_over(folder, steps)
        return None
    if config.resume == "auto":
        return folder / f"{PREFIX}{steps[-1]}" if steps else None
    path = Path(config.resume)
    if not (path / COMPLETE_FILE).is_file():
        raise UserError(
            f"not a complete checkpoint; expected RUN/checkpoints/{PREFIX}N", field="resume", value=path
        )
    return path


def read_mark(checkpoint: Path) -> dict[str, Any]:
    """The record that `RunCallback` wrote: step, world, stage, config, data, metrics_offset, wandb_id.

    Raises:
        UserError: damaged.
    """
    try:
        return json.loads((checkpoint / COMPLETE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint / COMPLETE_FILE}: cannot be read ({one_line(error)}); resume from another checkpoint"
        ) from None


def check_same_finetuning(config: FinetuneConfig, mark: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume with settings or data that would change the result.

    Args:
        mark: of the checkpoint, see `read_mark`.
        now: stage, precision and data of this start, as in the mark.

    Raises:
        UserError: names the first difference.
    """
    free = FINETUNE_FREE_KEYS | {"deepspeed"}
    if config.train.loss == "batches":  # then it is what is averaged
        free -= {"train.micro_batch"}
    refuse_changed_keys(mark["config"], config, free)
    if mark["stage"] != now["stage"]:
        raise UserError(
            f"deepspeed {config.deepspeed} is ZeRO-{now['stage']}, but the checkpoint was written by "
            f"ZeRO-{mark['stage']}, and their states do not convert; use the same stage"
        )
    if mark["precision"] != now["precision"]:
        raise UserError(
            f"model.precision is {now['precision']} on this machine, the run was started with {mark['precision']}; "
            f"set model.precision to {mark['precision']}"
        )
    if mark["data"] != now["data"]:
        raise UserError(
            "data.conversations: differ from those the run was started with; use those or another run.dir"
        )


def needs_universal(mark: dict[str, Any], world_size: int) -> bool:
    return int(mark["world"]) != world_size


def make_universal(checkpoint: Path) -> None:
    """Convert DeepSpeed's state to its universal form, which any number of processes can load.

    Raises:
        UserError: the conversion failed; with the last line of its output.
    """
    tag = (checkpoint / "latest").read_text().strip()
    target = checkpoint / f"{tag}_universal"
    if (checkpoint / "latest_universal").is_file() and target.is_dir():
        return
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(target)]
    # The converter fails on parameters without optimizer state unless it may inject it.
    command += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"{checkpoint}: cannot be converted for another number of processes ({reason}); resume on "
            "the number of processes that wrote it"
        )
