"""What a report shows besides predictions and metrics: audit, protocols, pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataio.core.errors import UserError
from engines.attribution.gallery import build_gallery, describe_item, faithfulness_of
from engines.audit.gate import AUDIT
from engines.evaluate.predictions import read_predictions
from engines.report.page import Context, write_report

PROTOCOL = "protocol.json"


def report_evaluation(
    *,
    output: str,
    data: str,
    split: str,
    checkpoint: str,
    protocols: Sequence[str] = (),
    explainer: str | None = None,
    pictures: int = 2,
) -> Path:
    """Write report.html and report.md beside the predictions.parquet and metrics.json of `output`.

    Args:
        data, split, checkpoint: what was predicted, and by what. protocols: folders with a
            protocol.json. explainer: run folder of a finetuned TinyLLaVA. pictures: of each
            generator and outcome in the gallery; 0: none.

    Returns:
        the page.

    Raises:
        UserError: a file that cannot be read or written.
    """
    table = read_predictions(Path(output) / "predictions.parquet")
    metrics = _read_json(Path(output) / "metrics.json")
    audit = Path(data) / AUDIT
    shown, faithfulness = _gallery(table, data, split, checkpoint, pictures) if pictures else ([], None)
    context = Context(
        data=data,
        split=split,
        audit=_read_json(audit) if audit.is_file() else None,
        protocols=[read_protocol(folder) for folder in protocols],
        pictures=shown,
        faithfulness=faithfulness,
        benchmarks=[] if explainer is None else read_benchmarks(explainer),
    )
    return write_report(output, table, metrics, context)


def read_protocol(folder: str | Path) -> dict[str, Any]:
    """The protocol.json of a folder.

    Raises:
        UserError: none there, or another program's.
    """
    path = Path(folder) / PROTOCOL
    found = _read_json(path)
    if found.get("schema") != "telltale-protocol":
        raise UserError(f"--protocols {path}: not a protocol's result; give a folder of launch/protocol.py")
    return found


def read_benchmarks(run: str | Path) -> list[dict[str, Any]]:
    """What a finetuned TinyLLaVA's answers to its benchmarks are worth: name and metrics of each.

    Raises:
        UserError: none were answered, or a file is another program's.
    """
    folder, found = Path(run) / "vqa", []
    for path in sorted(folder.glob("*/metrics.json")):
        metrics = _read_json(path)
        if metrics.get("schema") != "telltale-vqa-metrics":
            raise UserError(f"--explainer {path}: not a benchmark's metrics; answer it again")
        found.append({"name": path.parent.name, **metrics})
    if not found:
        raise UserError(
            f"--explainer {run}: no answered benchmark in {folder}; give a run folder of launch/finetune_mlm.py "
            "whose configuration names evaluate.benchmarks"
        )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); make it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected an object; make it again")
    return found


def _gallery(
    table: pa.Table, data: str, split: str, checkpoint: str, pictures: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    items = build_gallery(table, data, split, checkpoint, per_outcome=pictures)
    found = faithfulness_of(items, checkpoint)
    return [describe_item(item) for item in items], {**found, "sentence": faithfulness_sentence(found)}


def faithfulness_sentence(found: Mapping[str, Any]) -> str:
    """What may be said of the maps, from `compare_with_random`'s result."""
    if found.get("deletion") is None or found["deletion"]["interval"] is None:
        return f"Not measured: {found.get('reason', 'no maps')}."
    parts, better = [], []
    for name, sign in (("deletion", -1), ("insertion", 1)):
        low, high = found[name]["interval"]
        better.append(low > 0 if sign > 0 else high < 0)
        parts.append(
            f"{name} AUC {found[name]['map']:.3f}, random maps {found[name]['random']:.3f} "
            f"(difference {found[name]['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})"
        )
    verdict = {
        2: "Both speak for the maps.",
        1: "Only one of the two speaks for the maps: read them with care.",
        0: "Neither speaks for the maps: do not read them as reasons.",
    }[sum(better)]
    return f"On {found['images']} of these images: {'; '.join(parts)}. {verdict}"
