"""Continuing a finetuning run, on the same number of processes or on another."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dataio.core.errors import UserError
from engines.config.mlm import FINETUNE_FREE_KEYS, FinetuneConfig
from engines.config.values import refuse_changed_keys
from engines.mlm.trainer import COMPLETE_FILE
from engines.runtime.run_folder import refuse_to_start_over

PREFIX = "checkpoint-"


def steps_of(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, oldest first."""
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if number.isdigit() and (path / COMPLETE_FILE).is_file():
            found.append(int(number))
    return sorted(found)


def find_checkpoint(config: FinetuneConfig, folder: Path) -> Path | None:
    """The checkpoint that `config.resume` asks for, or None to begin.

    Raises:
        UserError: none is asked for where there are some, or a file that is none.
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
    """What `RunCallback` wrote: step, world, stage, config, data, metrics_offset, wandb_id.

    Raises:
        UserError: damaged.
    """
    try:
        return json.loads((checkpoint / COMPLETE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint / COMPLETE_FILE}: cannot be read ({error}); resume from another checkpoint"
        ) from None


def check_same_finetuning(config: FinetuneConfig, mark: dict[str, Any], now: dict[str, Any]) -> None:
    """A continuation must not silently become another run.

    Args:
        now: stage, precision and data of this start, as in the mark.
    """
    refuse_changed_keys(mark["config"], config, FINETUNE_FREE_KEYS | {"deepspeed"})
    if mark["stage"] != now["stage"]:
        raise UserError(
            f"deepspeed {config.deepspeed} is ZeRO-{now['stage']}, but the checkpoint was written by "
            f"ZeRO-{mark['stage']}, and their states do not convert; use the same stage"
        )
    if mark["precision"] != now["precision"]:
        raise UserError(
            f"model.precision is {now['precision']} on this machine, the run was started with {mark['precision']}; "
            f"add --model.precision {mark['precision']}"
        )
    if mark["data"] != now["data"]:
        raise UserError(
            "data.conversations: not those the run was started with; use those or another run.dir"
        )


def needs_universal(mark: dict[str, Any], world_size: int) -> bool:
    return int(mark["world"]) != world_size


def make_universal(checkpoint: Path) -> None:
    """Convert DeepSpeed's state to its universal form, which any number of processes loads.

    Raises:
        UserError: the conversion failed; gives its last line.
    """
    tag = (checkpoint / "latest").read_text().strip()
    target = checkpoint / f"{tag}_universal"
    if (checkpoint / "latest_universal").is_file() and target.is_dir():
        return
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(target)]
    # Without the missing state (the step of parameters that have no optimiser) it asserts.
    command += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"{checkpoint}: cannot be made loadable on another number of processes ({said}); resume on the "
            "number it was written by"
        )
