"""metrics.json as plain text for a terminal of 100 columns."""

from typing import Any

_DETECTORS = ("AUROC", "auroc"), ("AP", "ap")


def format_table(metrics: dict[str, Any]) -> str:
    """The metrics as plain text: errors in per cent with counts and 95 % intervals.

    Args:
        metrics: as `compute_metrics` returns them.
    """
    overall, counts = metrics["overall"], metrics["counts"]
    lines = [
        f"{counts['images']} images: {counts['real']} real, {counts['fake']} fake; "
        f"{counts['object_known']} of known object"
    ]
    lines += ["", *_errors(metrics), "", *_detection(metrics)]
    if overall["real_fake_error_calibrated"] is not None:
        lines += _decision(metrics)
    lines += ["", *_per_generator(metrics)]
    if metrics["open_set"] is not None:
        lines += ["", *_open_set(metrics["open_set"])]
    return "\n".join(lines)


def _intervals(metrics: dict[str, Any]) -> dict[str, Any]:
    """The intervals to show: over groups where images have some."""
    return metrics["intervals"][metrics["intervals"]["headline"]]


def _errors(metrics: dict[str, Any]) -> list[str]:
    overall, counts = metrics["overall"], metrics["counts"]
    intervals = _intervals(metrics)["overall"]
    images, known = counts["images"], counts["object_known"]
    photographs = counts["object_known_nature"]
    rows = (
        ("generator", "generator_error", images),
        ("generator, SD 1.4 and 1.5 as one", "generator_error_sd_merged", images),
        ("real/fake, P(fake) >= 0.5", "real_fake_error", images),
        ("real/fake, likeliest generator", "real_fake_error_argmax", images),
        ("real/fake, frozen threshold", "real_fake_error_calibrated", images),
        ("object", "object_error", known),
        ("object, photographs only", "object_error_nature", photographs),
        ("object, fakes only", "object_error_fake", known - photographs),
        ("object not in the top 5", "object_top5_error", known),
        ("generator or object", "joint_error", known),
    )
    unit = metrics["intervals"]["headline"]
    lines = [f"{'':34}{'error':>9}  {'wrong of all':18}95 % interval, over {unit}"]
    for title, key, total in rows:
        if overall[key] is None:
            continue
        wrong = f"{round(overall[key] * total)} of {total}"
        interval = intervals.get(key)
        shown = "" if interval is None else f"{_percent(interval[0])} to {_percent(interval[1])}"
        lines.append(f"{title:34}{_percent(overall[key]):>9}  {wrong:18}{shown}".rstrip())
    return lines


def _detection(metrics: dict[str, Any]) -> list[str]:
    overall, intervals = metrics["overall"], _intervals(metrics)["overall"]
    scores = []
    for name, key in _DETECTORS:
        found = intervals.get(key)
        shown = "" if found is None else f" ({_score(found[0])} to {_score(found[1])})"
        scores.append(f"{name} {_score(overall[key])}{shown}")
    lines = [f"real/fake: {', '.join(scores)}; EER {_percent(overall['eer'])}"]
    lines.append(
        f"accuracy on real {_percent(overall['accuracy_real'])}, on fake {_percent(overall['accuracy_fake'])}, "
        f"balanced {_percent(overall['balanced_accuracy'])}"
    )
    lines.append(
        f"detected at 1 % false alarms {_percent(overall['tpr_at_fpr_1'])}, "
        f"at 5 % {_percent(overall['tpr_at_fpr_5'])}; "
        f"ECE {_score(overall['ece'])}, NLL {_score(overall['nll'])}, Brier {_score(overall['brier'])}"
    )
    means = metrics["over_generators"]["balanced_accuracy"]
    if means["worst"] is not None:
        worst = means["worst"]
        spread = "" if means["std"] is None else f" ± {100 * means['std']:.2f}"
        lines.append(f"balanced accuracy over generators: mean {100 * means['mean']:.2f}{spread} %")
        found = metrics["intervals"]["generators"]["balanced_accuracy"]
        if found is not None:
            lines[-1] += f" ({_percent(found[0])} to {_percent(found[1])})"
        lines.append(f"worst generator: {worst['generator']}, {_percent(worst['value'])}")
    attribution = metrics["attribution"]
    if attribution["macro_f1"] is not None:
        merged = attribution["macro_f1_sd_merged"]
        lines.append(f"attribution: macro-F1 {_score(attribution['macro_f1'])}")
        if merged is not None:
            lines[-1] += f", SD 1.4 and 1.5 as one {_score(merged)}"
    return lines


def _decision(metrics: dict[str, Any]) -> list[str]:
    overall = metrics["overall"]
    return [
        f"frozen threshold: false alarms {_percent(overall['false_alarm_rate_calibrated'])}, "
        f"detected {_percent(overall['detection_rate_calibrated'])}; "
        f"calibrated ECE {_score(overall['ece_calibrated'])}",
        f"unsure of {_percent(overall['unsure_share_calibrated'])}; "
        f"error on the rest {_percent(overall['real_fake_error_sure_calibrated'])}",
    ]


def _per_generator(metrics: dict[str, Any]) -> list[str]:
    intervals = _intervals(metrics)["per_generator"]
    width = min(24, max(10, *(len(name) for name in metrics["per_generator"])))
    heads = ("images", "generator", "real/fake", "object", "AP", "AUROC")
    widths = (8, 11, 11, 10, 8, 8)
    lines = [f"{'errors on':{width}}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]
    lines[0] += "  95 % interval"
    for name, values in metrics["per_generator"].items():
        if values["n"] == 0:
            continue
        errors = [_percent(values[f"{key}_error"]) for key in ("generator", "real_fake", "object")]
        cells = [str(values["n"]), *errors, _score(values["ap"]), _score(values["auroc"])]
        found = intervals[name]["auroc"]
        shown = "" if found is None else f"  {_score(found[0])} to {_score(found[1])}"
        row = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"{_short(name, width):{width}}{row}{shown}")
    return lines


def _open_set(found: dict[str, Any]) -> list[str]:
    lines = [
        f"never seen: {', '.join(found['held_out'])} ({found['unknown']} images)",
        f"rejected with AUROC {_score(found['auroc'])}, OSCR {_score(found['oscr'])}; "
        f"known {found['known']} images, named right {_percent(found['closed_set_accuracy'])}",
    ]
    return [_short(line, 100) for line in lines]


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
