"""An audit's verdict, its reasons, and its report as plain text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engines.audit.label_order import disagrees
from engines.audit.probes import BARS, cannot_say, leaks
from engines.stats.text_table import text_table

_TITLES = {"container": "container", "pixels": "pixel statistics"}
_LEVELS = ("pass", "warn", "fail")
_LEVEL = {"container": "fail", "pixels": "warn"}
_MANY_UNREADABLE = 0.05
# What a leak in each family of pixel statistics may come from.
_MEANING = {
    "bytes per pixel": "another compression, or smoother pictures",
    "colour": "other subjects or another rendering",
    "radial spectrum": "other resize factors, or what the generators do",
    "resize factor": "other resize factors, or what the generators do",
    "JPEG history": "another number or quality of JPEG compressions",
}


@dataclass(frozen=True)
class Reason:
    """Why a verdict is not a pass: its level, a whole sentence, and a few words for a log."""

    level: str
    text: str
    short: str


def add_verdict(results: dict[str, Any]) -> dict[str, Any]:
    """Put verdict, reasons and their short forms in front of an audit's results."""
    reasons = [*_leak_reasons(results["probes"], results["origins"]), *_other_reasons(results)]
    reasons.sort(key=lambda reason: -_LEVELS.index(reason.level))
    verdict = reasons[0].level if reasons else "pass"
    head = {"format": results["format"], "version": results["version"], "verdict": verdict}
    head |= {"reasons": [reason.text for reason in reasons], "short": [reason.short for reason in reasons]}
    return head | results


def interval(probe: Mapping[str, Any]) -> str:
    return f"{probe['auroc']:.3f} [{probe['low']:.3f}, {probe['high']:.3f}]"


def carriers(probe: Mapping[str, Any], kind: str) -> list[str]:
    """The families that leak by themselves, strongest first; else the strongest."""
    known = {name: family for name, family in probe["families"].items() if family["auroc"] is not None}
    ordered = sorted(known, key=lambda name: -known[name]["auroc"])
    return [name for name in ordered if leaks(known[name], kind)] or ordered[:1]


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _leak_reasons(probes: Mapping[str, Any], origins: Mapping[str, Any]) -> Iterator[Reason]:
    doubts = []  # listed after the leaks
    for kind, entry in probes.items():
        overall, title = entry["overall"], _TITLES[kind]
        if leaks(overall, kind):
            yield _leak(kind, "fakes", overall, entry, origins)
            continue
        for name, probe in entry["generators"].items():
            if leaks(probe, kind):
                yield _leak(kind, name, probe, probe, origins)
        unsure = cannot_say(overall, kind)
        if unsure:
            text = f"{title}: too few images to say: {unsure}; give more, or a larger --sample"
            doubts.append(Reason("warn", text, f"{title}: too few images"))
            continue
        few = [name for name, probe in entry["generators"].items() if cannot_say(probe, kind)]
        if few:
            names = ", ".join(f"{name} ({entry['generators'][name]['fake']})" for name in few)
            text = (
                f"{title}: too few images to say for each generator, though over all there is no leak: {names}; "
                "give more, or a larger --sample"
            )
            doubts.append(Reason("warn", text, f"{title}: too few images of {len(few)} generators"))
    yield from doubts


def _leak(
    kind: str, what: str, probe: Mapping[str, Any], parts: Mapping[str, Any], origins: Mapping[str, Any]
) -> Reason:
    names = carriers(parts, kind)
    by_family = _and([f"{name} ({parts['families'][name]['auroc']:.3f})" for name in names])
    text = (
        f"{_TITLES[kind]} leak: {what} are separable from photographs without looking at the picture, AUROC "
        f"{interval(probe)}, bar {BARS[kind]:.2f}; carried by {by_family}"
    )
    if kind == "pixels":
        text += f". The first of these means {_MEANING[names[0]]}"
        apart = [name for name, origin in origins.items() if leaks(origin, kind)]
        if apart:
            best = max(apart, key=lambda name: origins[name]["auroc"])
            by_origin = _and(
                [
                    f"{name} ({origins[best]['families'][name]['auroc']:.3f})"
                    for name in carriers(origins[best], kind)
                ]
            )
            text += (
                f". Photographs of different sources were not treated alike either: {len(apart)} of {len(origins)} "
                f"sources are separable from the others, {best} with AUROC {interval(origins[best])} by {by_origin}"
            )
    of = "" if what == "fakes" else f" of {what}"
    return Reason(_LEVEL[kind], text, f"{_TITLES[kind]}{of} {probe['auroc']:.2f} ({_and(names)})")


def _other_reasons(results: Mapping[str, Any]) -> Iterator[Reason]:
    counts, duplicates, order = results["counts"], results["duplicates"], results["order"]
    measured = counts["looked_at"] + counts["unreadable"]
    if counts["unreadable"] > (0 if results["source"]["kind"] == "shards" else _MANY_UNREADABLE * measured):
        first, reason = results["unreadable"][0]
        text = f"{counts['unreadable']} of {measured} images cannot be read, first: {first} ({reason})"
        yield Reason("warn", text, f"{counts['unreadable']} unreadable")
    whole = duplicates["whole"] or {}
    across = max(whole.get("exact_across_splits", 0), duplicates["exact_across_splits"])
    if across:
        text = (
            f"duplicates: {across} pairs of equal pixels lie in two splits, which makes test figures too good"
        )
        yield Reason("warn", text, f"{across} duplicates across splits")
    if both := duplicates["exact_real_and_fake"]:
        text = f"duplicates: {both} pairs of equal pixels are stored as a photograph and as a fake"
        yield Reason("warn", text, f"{both} duplicates of both labels")
    for split, entry in results["balance"].items():
        if 0 in (entry["real"], entry["fake"]):
            missing = "photographs" if entry["real"] == 0 else "fakes"
            yield Reason("warn", f"balance: the {split} split has no {missing}", f"{split} has no {missing}")
    for split, entry in order["splits"].items():
        if not entry["mixed"]:
            text = (
                f"order: the {split} split is not mixed: {entry['equal_neighbours']:.1%} of neighbors are of one "
                f"generator (mixed: {entry['expected']:.1%}), position predicts fakes with AUROC "
                f"{entry['position_auroc']}"
            )
            yield Reason("warn", text, f"{split} is not mixed")
    if disagrees(order["names"]):
        names = order["names"]
        text = (
            f"labels: of {names['images']} images, {names['real_fake_wrong']} are real where their file's name says "
            f"fake or the reverse, {names['generator_wrong']} have another generator, {names['object_wrong']} another "
            f"object; first: {names['first']}"
        )
        yield Reason("warn", text, "labels disagree with names")


def format_audit(audit: Mapping[str, Any]) -> str:
    """An audit as plain text for a terminal."""
    counts, settings = audit["counts"], audit["settings"]
    units = "groups" if settings["grouped"] else "images"
    bars = ", ".join(f"{_TITLES[kind]} {bar:.2f}" for kind, bar in settings["bars"].items())
    lines = [
        f"{counts['looked_at']} of {counts['images']} images measured, {counts['unreadable']} could not be read",
        *(f"  {name}: {reason}" for name, reason in audit["unreadable"][:5]),
        "",
        "How well does a small classifier separate fakes from photographs without looking at the picture?",
        f"AUROC: 0.5 is chance, 1 is perfect. In brackets the 95 % interval over {units}.",
        f"A leak (*) is an interval above the bar: {bars}",
        "",
        _probe_table(audit["probes"]),
        "",
        *_family_tables(audit["probes"]),
        *_origin_table(audit["origins"]),
        _balance_table(audit["balance"]),
        "",
        *_duplicate_lines(audit["duplicates"]),
        *_order_lines(audit["order"]),
        "",
        f"verdict: {audit['verdict'].upper()}",
        *(f"  - {reason}" for reason in audit["reasons"]),
    ]
    return "\n".join(lines)


def _cell(probe: Mapping[str, Any], kind: str) -> str:
    if probe["auroc"] is None:
        return "too few"
    return interval(probe) + (" *" if leaks(probe, kind) else "")


def _probe_table(probes: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = [["photographs", probes["container"]["overall"]["real"]]]
    for name in (None, *probes["container"]["generators"]):
        row = {
            kind: entry["overall"] if name is None else entry["generators"][name]
            for kind, entry in probes.items()
        }
        cells = [_cell(probe, kind) for kind, probe in row.items()]
        rows.append([name or "all fakes", row["container"]["fake"], *cells])
    heads = ["", "images", *(_TITLES[kind] for kind in probes)]
    return text_table([[*row, *[None] * (len(heads) - len(row))] for row in rows], heads, align="lrll")


def _family_tables(probes: Mapping[str, Any]) -> Iterator[str]:
    for kind, entry in probes.items():
        if not entry["families"]:
            continue
        rows = [
            [name, probe["reason"] if probe["auroc"] is None else _cell(probe, kind)]
            for name, probe in entry["families"].items()
        ]
        yield text_table(rows, [f"{_TITLES[kind]}, each family alone", "all fakes"])
        for feature in entry["features"][:3] if leaks(entry["overall"], kind) else ():
            medians = f"median {feature['real']} real, {feature['fake']} fake"
            yield f"  {feature['feature']}: alone {feature['auroc']:.3f}; {medians}"
        yield ""


def _origin_table(origins: Mapping[str, Any]) -> Iterator[str]:
    if not origins:
        return
    rows = [
        [
            name or "(none given)",
            probe["images"],
            _cell(probe, "pixels"),
            ", ".join(carriers(probe, "pixels")) if leaks(probe, "pixels") else "",
        ]
        for name, probe in origins.items()
    ]
    heads = ["photographs of each source", "images", "against the other photographs", "by"]
    yield text_table(rows, heads, align="lrll")
    yield ""


def _balance_table(balance: Mapping[str, Any]) -> str:
    names = dict.fromkeys(name for entry in balance.values() for name in entry["generators"])
    cells = {name: [entry["generators"][name] for entry in balance.values()] for name in names}
    rows: list[list[Any]] = [[name, *counts] for name, counts in cells.items() if any(counts)]
    rows.append(["photographs", *(f"{entry['real'] / entry['images']:.1%}" for entry in balance.values())])
    return text_table(rows, ["all images", *balance], align="l" + "r" * len(balance))


def _duplicate_lines(duplicates: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"duplicates among the {duplicates['images']} measured: {duplicates['exact']} pairs of equal pixels "
        f"({duplicates['exact_across_splits']} across splits, {duplicates['exact_real_and_fake']} real and fake), "
        f"{duplicates['near']} near-duplicates ({duplicates['near_across_splits']} across splits, "
        f"{duplicates['near_real_and_fake']} real and fake)"
    )
    if whole := duplicates["whole"]:
        yield (
            f"  among all sources, found when sharding: {whole['exact']} equal ({whole['exact_across_splits']} across "
            f"splits), {whole['near']} near ({whole['near_across_splits']} across splits)"
        )


def _order_lines(order: Mapping[str, Any]) -> Iterator[str]:
    for split, entry in order["splits"].items():
        if entry["equal_neighbours"] is not None:
            yield (
                f"order of {split}: {'mixed' if entry['mixed'] else 'NOT MIXED'}; {entry['equal_neighbours']:.1%} of "
                f"neighbors are of one generator, {entry['expected']:.1%} expected"
            )
    if not order["splits"]:
        yield "order: not checked, since telltale shard permutes the images"
    if (counting := order["counting"]) is not None:
        yield (
            f"label order: classes are read from names; counting them in each folder would have given "
            f"{counting['shifted_images']} of {counting['images']} images another object"
        )
    if (names := order["names"]) is not None:
        yield (
            f"labels against file names: {names['images']} compared; wrong: {names['real_fake_wrong']} real/fake, "
            f"{names['generator_wrong']} generator, {names['object_wrong']} object"
        )
