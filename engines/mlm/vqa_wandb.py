"""A benchmark's answers for Weights & Biases: the metrics, and a table of questions beside their images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataio.vqa.conversations import load_rgb, resolve_image
from engines.mlm.vqa_metrics import is_right
from engines.runtime.wandb_results import Results, ResultTable, send_results, table_of
from engines.runtime.wandb_run import Picture

_ROWS = 100  # each has its image uploaded,
_SIDE = 384  # of at most so many pixels
_COLUMNS = ("image", "id", "question", "truth", "answer", "right", "P(fake)")


def send_answers(
    folder: Path,
    mode: str,
    items: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    *,
    benchmark: str | Path,
    images: str | Path | None,
    model: str | Path,
) -> None:
    """Send the answers in `folder` to Weights & Biases; a failure is a warning.

    The table has the first 100, the wrong ones before the right ones.

    Args:
        mode: see `engines.runtime.wandb_results`. items: answered. metrics: of them.
        benchmark, images: file of the items, and the folder of their images (None: the file's). model: of RUN.
    """
    place = Path(images) if images else Path(benchmark).parent
    chosen = sorted(items, key=is_right)[:_ROWS]
    rows = [
        [
            Picture(_pixels(resolve_image(item["image"], place))),
            item["id"],
            item["question"],
            item["ground_truth"],
            item["answer"],
            is_right(item),
            item.get("p_fake"),
        ]
        for item in chosen
    ]
    tables = {"answers": ResultTable(_COLUMNS, rows)}
    if metrics["per_generator"]:
        tables["generators"] = table_of(metrics["per_generator"], "generator")
    numbers = {key: value for key, value in metrics.items() if key not in ("version", "per_generator")}
    settings = {"benchmark": str(benchmark), "model": str(model), "kind": metrics["kind"]}
    send_results(folder, mode, Results("benchmark", settings, numbers, tables=tables), measured=model)


def _pixels(path: str) -> NDArray[np.uint8]:
    picture = load_rgb(path)
    picture.thumbnail((_SIDE, _SIDE))
    return np.asarray(picture)
