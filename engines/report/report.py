"""Report an evaluation, with its audit, protocols, pictures and benchmark answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataio.core.errors import UserError, one_line
from dataio.core.versioned_json import read_versioned_json
from dataio.shards.manifest import sha256_of
from dataio.sources.remote_path import AnyPath, place_of
from engines.attribution.gallery import build_gallery, describe_item, faithfulness_of
from engines.audit.gate import AUDIT
from engines.evaluate.evaluate import METRICS, PREDICTIONS
from engines.evaluate.predictions import data_info, read_predictions
from engines.report.page import Context, write_report

_PROTOCOL = "protocol.json"


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
        output: the evaluation's folder.
        data, split, checkpoint: shards, split and checkpoint of the evaluation.
        protocols: folders with a protocol.json.
        explainer: run folder of a finetuned TinyLLaVA.
        pictures: number in the gallery for each generator and outcome; 0 for no gallery.

    Returns:
        the path of report.html.

    Raises:
        UserError: a file cannot be read or written; the predictions are of other shards.
    """
    table = read_predictions(Path(output) / PREDICTIONS)
    metrics = _read_json(Path(output) / METRICS)
    _check_data(table, data, split)
    audit = place_of(data) / AUDIT
    shown, faithfulness = _gallery(table, data, split, checkpoint, pictures) if pictures else ([], None)
    context = Context(
        data=data,
        split=split,
        audit=_read_json(audit) if audit.is_file() else None,
        protocols=[read_protocol(folder) for folder in protocols],
        pictures=shown,
        faithfulness=faithfulness,
        benchmarks=[] if explainer is None else read_benchmarks(explainer),
        run=_run_of(checkpoint),
    )
    return write_report(output, table, metrics, context)


def _run_of(checkpoint: str) -> str:
    """Name of the run folder that a checkpoint is in."""
    path = Path(checkpoint).resolve()
    folder = path if path.is_dir() else path.parent
    return folder.parent.name if folder.name == "checkpoints" else folder.name


def _check_data(table: pa.Table, data: str, split: str) -> None:
    """Refuse shards that the predictions say they are not of."""
    described, manifest = data_info(table), place_of(data) / "manifest.json"
    if not described or not manifest.is_file():
        return
    if described["split"] != split or described["manifest_sha256"] != sha256_of(manifest):
        raise UserError(
            f"the predictions are of {described['folder']} ({described['split']} split), not of the {split} split of "
            "these shards; give those, or evaluate again",
            field="data",
            value=data,
        )


def read_protocol(folder: str | Path) -> dict[str, Any]:
    """The protocol.json of a folder.

    Raises:
        UserError: it is missing or not a protocol's result.
    """
    return _read(
        Path(folder) / _PROTOCOL,
        "telltale-protocol",
        "a protocol's result",
        "give a folder of telltale protocol",
    )


def read_benchmarks(run: str | Path) -> list[dict[str, Any]]:
    """Name and metrics of each benchmark that a finetuned TinyLLaVA has answered.

    Raises:
        UserError: none was answered, or a file is not a benchmark's metrics.
    """
    folder = Path(run) / "vqa"
    benchmarks = [
        {
            "name": path.parent.name,
            **_read(path, "telltale-vqa-metrics", "a benchmark's metrics", "answer it again"),
        }
        for path in sorted(folder.glob("*/metrics.json"))
    ]
    if not benchmarks:
        raise UserError(
            f"no answered benchmark in {folder}; give a run folder of telltale finetune whose "
            "configuration names evaluate.benchmarks",
            field="explainer",
            value=run,
        )
    return benchmarks


def _read(path: Path, schema: str, what: str, hint: str) -> dict[str, Any]:
    try:
        return read_versioned_json(path, schema, (), hint, what=what, key="schema")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {hint}") from None


def _read_json(path: AnyPath) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); make it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected an object; make it again")
    return values


def _gallery(
    table: pa.Table, data: str, split: str, checkpoint: str, pictures: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    items = build_gallery(table, data, split, checkpoint, per_outcome=pictures)
    faithfulness = faithfulness_of(items, checkpoint)
    return [describe_item(item) for item in items], {
        **faithfulness,
        "sentence": faithfulness_sentence(faithfulness),
    }


def faithfulness_sentence(faithfulness: Mapping[str, Any]) -> str:
    """The conclusion on the maps, from the result of `compare_with_random`."""
    if faithfulness.get("deletion") is None or faithfulness["deletion"]["interval"] is None:
        return f"Not measured: {faithfulness.get('reason', 'no maps')}."
    parts, better = [], []
    for name, sign in (("deletion", -1), ("insertion", 1)):
        low, high = faithfulness[name]["interval"]
        better.append(low > 0 if sign > 0 else high < 0)
        parts.append(
            f"{name} AUC {faithfulness[name]['map']:.3f}, random maps {faithfulness[name]['random']:.3f} "
            f"(difference {faithfulness[name]['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})"
        )
    conclusion = {
        2: "Both support the maps.",
        1: "Only one of the two supports the maps: read them with care.",
        0: "Neither supports the maps: do not read them as reasons.",
    }[sum(better)]
    return f"On {faithfulness['images']} of these images: {'; '.join(parts)}. {conclusion}"
