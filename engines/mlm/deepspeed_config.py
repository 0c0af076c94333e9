"""Read and validate DeepSpeed's JSON before anything is loaded."""

import json
from collections.abc import Mapping
from typing import Any

from dataio.core.errors import UserError, one_line
from engines.runtime.paths import find_config

# The Trainer sets these: it fills in "auto" and builds AdamW with a rate for each part.
_OURS = (
    "optimizer",
    "scheduler",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


def read_deepspeed(path: str) -> dict[str, Any]:
    """The file's settings.

    Args:
        path: absolute, relative to the working directory, or of a file that telltale ships.

    Raises:
        UserError: no such file, not JSON, a stage other than 1 to 3, a key of ZeRO-3 with
            another stage (DeepSpeed ignores some and fails on others), or a setting that the
            experiment's configuration decides.
    """
    file = find_config(path)
    if not file.is_file():
        raise UserError(f"deepspeed {path}: no such file; see configs/deepspeed/")
    try:
        settings = json.loads(file.read_text())
        zero = settings["zero_optimization"]
        stage = zero["stage"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a DeepSpeed file with zero_optimization.stage ({one_line(error)})"
        ) from None
    if stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}, expected 1, 2 or 3")
    for key in zero:
        if stage < 3 and (key.startswith("stage3_") or key == "offload_param"):
            raise UserError(
                f"{path}: {key} is a key of ZeRO-3, but the stage is {stage}; remove it or use zero3.json"
            )
    if stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            f"{path}: stage3_gather_16bit_weights_on_model_save must be true, or no model could be saved"
        )
    for key in _OURS:
        if settings.get(key, "auto") != "auto":
            raise UserError(
                f'{path}: {key} is set, but the experiment\'s configuration decides it; remove it or say "auto"'
            )
    if offloads(settings):
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, see FinetuneTrainer
    return settings


def stage_of(settings: Mapping[str, Any]) -> int:
    return int(settings["zero_optimization"]["stage"])


def offloads(settings: Mapping[str, Any], key: str = "offload_optimizer") -> bool:
    """Whether `offload_optimizer` or `offload_param` names a device."""
    return settings["zero_optimization"].get(key, {}).get("device", "none") != "none"
