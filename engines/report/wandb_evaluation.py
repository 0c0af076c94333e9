"""An evaluation for Weights & Biases: its metrics, a table of generators, and a table of pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataio.core.errors import UserError
from dataio.core.log import log
from engines.attribution.gallery import build_gallery
from engines.evaluate.evaluate import PREDICTIONS
from engines.evaluate.predictions import read_predictions
from engines.runtime.wandb_results import Results, ResultTable, send_results, table_of
from engines.runtime.wandb_run import Picture

_PICTURE_COLUMNS = ("picture", "key", "generator", "predicted", "object", "P(fake)", "verdict")


def send_evaluation(
    folder: Path,
    mode: str,
    metrics: Mapping[str, Any],
    *,
    checkpoint: str,
    data: str,
    split: str,
    pictures: int,
    report: bool,
) -> None:
    """Send the evaluation in `folder` to Weights & Biases; a failure is a warning.

    Args:
        mode: see `engines.runtime.wandb_results`. metrics: of metrics.json.
        checkpoint, data, split: of the evaluation.
        pictures: for each generator and outcome; 0: no table of pictures.
        report: send report.html of `folder` too.
    """
    tables = {"generators": table_of(metrics["per_generator"], "generator")}
    try:
        if pictures:
            tables["pictures"] = _pictures(folder, checkpoint, data, split, pictures)
    except UserError as error:
        log.warning(f"no table of pictures for Weights & Biases: {error}")
    values = {key: metrics[key] for key in ("overall", "counts") if key in metrics}
    settings = {
        "checkpoint": metrics["checkpoint"],
        "data": metrics.get("data"),
        "shards": data,
        "split": split,
    }
    pages = {"report": folder / "report.html"} if report else {}
    send_results(
        folder, mode, Results("evaluation", settings, values, tables=tables, pages=pages), measured=checkpoint
    )


def _pictures(folder: Path, checkpoint: str, data: str, split: str, count: int) -> ResultTable:
    items = build_gallery(
        read_predictions(folder / PREDICTIONS), data, split, checkpoint, per_outcome=count, cam=False
    )
    rows = [
        [
            Picture(item.picture, f"{item.generator}, P(fake) {item.p_fake:.2f}"),
            item.key,
            item.generator,
            item.generator_pred,
            item.object,
            item.p_fake,
            item.outcome,
        ]
        for item in items
    ]
    return ResultTable(_PICTURE_COLUMNS, rows)
