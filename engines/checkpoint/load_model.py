"""Building a trained detector from any file that holds one."""

from pathlib import Path
from typing import Any

from engines.checkpoint import files as checkpoints
from engines.checkpoint.export_format import read_export
from engines.config.detector import Config, from_dict
from engines.runtime.precision import set_tf32
from models.detector.dual_head import DualHead


def load_model(path: str | Path) -> tuple[DualHead, Config, dict[str, Any]]:
    """Build the network a checkpoint holds, in evaluation mode on the CPU.

    This process's fp32 products are then those of its training (`train.tf32`).

    Args:
        path: best.pt, a file of RUN/checkpoints, final.safetensors, the folder of an export, or
            RUN, which means its best.pt.

    Returns:
        the model, the configuration it was trained with, and the checkpoint's other plain
        values (step, labels, codec, layout; missing_class where it was trained on one class).

    Raises:
        UserError: missing, damaged, or not a telltale checkpoint.
    """
    path = checkpoints.locate(path)
    state = read_export(path) if Path(path).is_dir() else checkpoints.load(path)
    config = from_dict(state["config"])
    set_tf32(config.train.tf32)
    labels = state["labels"]
    model = DualHead(config.model, labels["generators"], labels["objects"], image_size=config.data.size)
    # The weights that the run validates: RUN/checkpoints hold the raw ones beside the average.
    model.load_state_dict(state.get("ema", state["model"]))
    info = {key: state[key] for key in ("step", "labels", "layout")}
    info["codec"] = state.get("codec")  # the first checkpoints may lack it
    if "missing_class" in state:
        info["missing_class"] = state["missing_class"]
    return model.eval(), config, info
