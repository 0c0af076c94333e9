"""The report of an evaluation: report.html and report.md.

Everything comes from the predictions table and metrics.json; the shards' audit, protocols
and pictures are added where they are given. The page is one file, needs no network, and says
how to get each part that is missing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dataio.core import atomic
from dataio.core.errors import UserError, writing
from engines.evaluate.columns import THRESHOLD, Labels
from engines.evaluate.sections.base import headline_intervals, percent_text, score_text
from engines.evaluate.sections.registry import all_metrics, shown_in
from engines.report import plots
from engines.runtime.versions import commit_of, version_of

_HTML, _MARKDOWN = "report.html", "report.md"
_LARGEST_PAGE = 15_000_000  # bytes
_BINS = 200  # of P(fake), for the movable threshold


@dataclass(frozen=True)
class Context:
    """What the report shows besides predictions and metrics.

    Attributes:
        data, split: the predicted shards and split. audit: the content of audit.json, or None.
        protocols: contents of protocol.json files. pictures: of the gallery, each with key,
            generator, generator_pred, p_fake, outcome, and data URIs image, heat (or "") and
            overlay (or ""). faithfulness: of their Grad-CAMs, or None.
        benchmarks: metrics of a finetuned TinyLLaVA's answers, each with its name.
        run: name of the run that the checkpoint is of, "" if unknown.
    """

    data: str
    split: str
    audit: Mapping[str, Any] | None = None
    protocols: Sequence[Mapping[str, Any]] = ()
    pictures: Sequence[Mapping[str, Any]] = ()
    faithfulness: Mapping[str, Any] | None = None
    benchmarks: Sequence[Mapping[str, Any]] = ()
    run: str = ""


def write_report(output: str | Path, table: pa.Table, metrics: Mapping[str, Any], context: Context) -> Path:
    """Write report.html and report.md into `output`; returns the path of report.html.

    Raises:
        UserError: a file cannot be written, or the page would exceed 15 MB.
    """
    folder, values = Path(output), _values(table, metrics, context)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "percent": percent_text}
    page = environment.get_template("report.html.j2").render(values)
    if len(page.encode()) > _LARGEST_PAGE:
        raise UserError(
            f"the report would have {len(page.encode()) / 1e6:.1f} MB, more than 15; ask for fewer pictures"
        )
    card = environment.get_template("report.md.j2").render(values)
    with writing(folder, field="output", hint=""):
        atomic.write_text(folder / _MARKDOWN, card)
        atomic.write_text(folder / _HTML, page)
    return folder / _HTML


def _figure(value: float | None, key: str = "") -> str:
    """A metric as text: four digits for scores, otherwise per cent."""
    metric = all_metrics().get(key.removesuffix("_calibrated"))
    return score_text(value) if metric is not None and metric.score else percent_text(value)


def _values(table: pa.Table, metrics: Mapping[str, Any], context: Context) -> dict[str, Any]:
    labels, intervals = Labels(table), metrics["intervals"]
    shown = headline_intervals(metrics)
    names = [name for name in labels.generators if metrics["per_generator"][name]["n"]]
    return {
        "metrics": metrics,
        "overall": metrics["overall"],
        "counts": metrics["counts"],
        "reasons": metrics["reasons"],
        "calibration": metrics["checkpoint"].get("calibration"),
        "checkpoint": metrics["checkpoint"],
        "data": metrics.get("data") or {},
        "context": context,
        "subject": f"{context.run}, " * bool(context.run) + metrics["checkpoint"]["checkpoint"],
        "commit": commit_of(),
        "release": version_of("telltale") or "",
        "level": f"{intervals['level']:.0%}".replace("%", " %"),
        "intervals": intervals,
        "shown_intervals": shown,
        "headlines": [
            {
                "title": title,
                "key": metric.key,
                "value": metrics["overall"][metric.key],
                "interval": shown["overall"].get(metric.key),
            }
            for metric, title in shown_in(lambda metric: metric.card)
            if metrics["overall"].get(metric.key) is not None
        ],
        "columns": [(metric.key, title) for metric, title in shown_in(lambda metric: metric.column)],
        "rows": [(name, metrics["per_generator"][name]) for name in names],
        "figures": _figures(labels, metrics),
        "protocols": [_protocol(protocol) for protocol in context.protocols],
        # "<" could end the script element that contains it.
        "explorer": json.dumps(_explorer(labels)).replace("<", "\\u003c"),
    }


def _figures(labels: Labels, metrics: Mapping[str, Any]) -> dict[str, str]:
    fake, figures = labels.fake, {}
    if fake.any() and not fake.all():
        figures["roc"] = plots.roc_figure(fake, labels.p_fake, labels.generator, labels.generators)
        curves = {"as trained": labels.p_fake}
        if labels.calibrated is not None:
            curves["calibrated"] = labels.calibrated
        figures["reliability"] = plots.reliability_figure(fake, curves)
    confusion = metrics["confusion"]["generator"]
    matrix, names = np.asarray(confusion["matrix"], float), np.asarray(confusion["labels"])
    true, called = matrix.any(1), matrix.any(0)
    shares = matrix[true][:, called] / matrix[true].sum(1, keepdims=True)
    figures["confusion"] = plots.matrix_figure(
        shares.tolist(),
        names[true].tolist(),
        names[called].tolist(),
        x="called",
        y="true",
        title="confusion of generators, share of each true generator",
    )
    return figures


def _explorer(labels: Labels) -> dict[str, Any]:
    """How many images of each generator have P(fake) in each of `_BINS` steps, for the movable threshold."""
    calibration = labels.calibration
    p = labels.p_fake if labels.calibrated is None else labels.calibrated
    bins = np.clip((p * _BINS).astype(int), 0, _BINS - 1)
    return {
        "bins": _BINS,
        "start": THRESHOLD if calibration is None else calibration.threshold,
        "calibrated": calibration is not None,
        "generators": [
            {"name": name, "counts": np.bincount(bins[labels.generator == index], minlength=_BINS).tolist()}
            for index, name in enumerate(labels.generators)
            if (labels.generator == index).any()
        ],
    }


def _protocol(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A protocol.json (see engines.experiments.protocol_result) as figures and a table."""
    name, rows, figures = str(protocol["protocol"]), [], []
    heads, caption = ["", "AUROC", "balanced accuracy"], "of the same images"
    if protocol.get("matrix"):
        matrix = protocol["matrix"]
        figures.append(
            {
                "svg": plots.matrix_figure(
                    matrix["auroc"],
                    matrix["train"],
                    matrix["test"],
                    x="tested on",
                    y="training",
                    title=f"{name}: AUROC of each training on each generator",
                    low=0.5,
                    form="{:.2f}",
                ),
                "caption": "AUROC of each generator against the photographs; 0.5 is chance.",
            }
        )
    if protocol.get("curves"):
        for operation, points in protocol["curves"].items():
            rows += [[f"{operation} {p['severity']:g}", *_two(p)] for p in points]
            kept = [(p["severity"], p["auroc"]) for p in points if p["auroc"] is not None]
            if len(kept) > 1:
                x, y = zip(*kept, strict=True)
                svg = plots.curves_figure({operation: (x, y)}, x=operation, y="AUROC")
                figures.append({"svg": svg, "caption": f"AUROC by severity of {operation}."})
        rows += [[f"GenImage: {key}", *_two(p)] for key, p in protocol.get("genimage", {}).items()]
    if protocol.get("gaps"):
        heads = [*heads, "below the originals (AUROC)"]
        metrics = {cell["name"]: cell["metrics"] for cell in protocol["cells"]}
        rows += [
            [view, *_two(metrics[view]), _figure(gap["auroc"], "auroc")]
            for view, gap in protocol["gaps"].items()
        ]
        caption = "views of the same originals: the difference that remains when files are alike"
    if rows and protocol.get("raw"):
        rows.insert(0, ["raw", *_two(protocol["raw"]), *["-"] * (len(heads) - 3)])
    return {"name": name, "figures": figures, "heads": heads, "rows": rows, "caption": caption}


def _two(metrics: Mapping[str, Any]) -> list[str]:
    return [_figure(metrics["auroc"], "auroc"), percent_text(metrics["balanced_accuracy"])]
