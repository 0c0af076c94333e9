"""From an audit's findings to its verdict, its reasons, and the page a person reads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engines.audit.label_order import disagrees
from engines.audit.probes import BARS, cannot_say, leaks

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


def add_verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Put verdict, reasons and their short forms in front of an audit's findings."""
    reasons = [*_leak_reasons(found["probes"], found["origins"]), *_other_reasons(found)]
    reasons.sort(key=lambda reason: -_LEVELS.index(reason.level))
    verdict = reasons[0].level if reasons else "pass"
    head = {"format": found["format"], "version": found["version"], "verdict": verdict}
    head |= {"reasons": [reason.text for reason in reasons], "short": [reason.short for reason in reasons]}
    return head | found


def interval(one: Mapping[str, Any]) -> str:
    return f"{one['auroc']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def carriers(one: Mapping[str, Any], kind: str) -> list[str]:
    """The families that leak by themselves, strongest first; else the strongest."""
    known = {name: family for name, family in one["families"].items() if family["auroc"] is not None}
    ordered = sorted(known, key=lambda name: -known[name]["auroc"])
    return [name for name in ordered if leaks(known[name], kind)] or ordered[:1]


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _leak_reasons(probes: Mapping[str, Any], origins: Mapping[str, Any]) -> Iterator[Reason]:
    doubts = []  # after all that is sure
    for kind, found in probes.items():
        overall, title = found["overall"], _TITLES[kind]
        if leaks(overall, kind):
            yield _leak(kind, "fakes", overall, found, origins)
            continue
        for name, one in found["generators"].items():
            if leaks(one, kind):
                yield _leak(kind, name, one, one, origins)
        unsure = cannot_say(overall, kind)
        if unsure:
            text = f"{title}: too few images to say: {unsure}; give more, or a larger --sample"
            doubts.append(Reason("warn", text, f"{title}: too few images"))
            continue
        few = [name for name, one in found["generators"].items() if cannot_say(one, kind)]
        if few:
            names = ", ".join(f"{name} ({found['generators'][name]['fake']})" for name in few)
            text = (
                f"{title}: too few images to say for each generator, though over all there is no leak: {names}; "
                "give more, or a larger --sample"
            )
            doubts.append(Reason("warn", text, f"{title}: too few images of {len(few)} generators"))
    yield from doubts


def _leak(
    kind: str, what: str, one: Mapping[str, Any], told: Mapping[str, Any], origins: Mapping[str, Any]
) -> Reason:
    names = carriers(told, kind)
    by_family = _and([f"{name} ({told['families'][name]['auroc']:.3f})" for name in names])
    text = (
        f"{_TITLES[kind]} leak: {what} are told from photographs without looking at the picture, AUROC "
        f"{interval(one)}, bar {BARS[kind]:.2f}; carried by {by_family}"
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
                f"sources are told from the others, {best} with AUROC {interval(origins[best])} by {by_origin}"
            )
    of = "" if what == "fakes" else f" of {what}"
    return Reason(_LEVEL[kind], text, f"{_TITLES[kind]}{of} {one['auroc']:.2f} ({_and(names)})")


def _other_reasons(found: Mapping[str, Any]) -> Iterator[Reason]:
    counts, duplicates, order = found["counts"], found["duplicates"], found["order"]
    looked = counts["looked_at"] + counts["unreadable"]
    if counts["unreadable"] > (0 if found["source"]["kind"] == "shards" else _MANY_UNREADABLE * looked):
        first, reason = found["unreadable"][0]
        text = f"{counts['unreadable']} of {looked} images cannot be read, first: {first} ({reason})"
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
    for split, entry in found["balance"].items():
        if 0 in (entry["real"], entry["fake"]):
            missing = "photographs" if entry["real"] == 0 else "fakes"
            yield Reason("warn", f"balance: the {split} split has no {missing}", f"{split} has no {missing}")
    for split, entry in order["splits"].items():
        if not entry["mixed"]:
            text = (
                f"order: the {split} split is not mixed: {entry['equal_neighbours']:.1%} of neighbours are of one "
                f"generator (mixed: {entry['expected']:.1%}), position tells fakes with AUROC {entry['position_auroc']}"
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


def format_audit(found: Mapping[str, Any]) -> str:
    """An audit as plain text for a terminal."""
    counts, settings = found["counts"], found["settings"]
    units = "groups" if settings["grouped"] else "images"
    lines = [
        f"{counts['looked_at']} of {counts['images']} images looked at, {counts['unreadable']} could not be read"
    ]
    lines += [f"  {name}: {reason}" for name, reason in found["unreadable"][:5]]
    lines += [
        "",
        "How well does a small classifier tell fakes from photographs without looking at the picture?",
        f"AUROC: 0.5 is guessing, 1 is always right. In brackets the 95 % interval over {units}.",
        "A leak (*) is an interval above the bar: "
        + ", ".join(f"{_TITLES[kind]} {bar:.2f}" for kind, bar in settings["bars"].items()),
        "",
        *_probe_table(found["probes"]),
        "",
        *_family_table(found["probes"]),
        "",
        *_origin_table(found["origins"]),
        *_balance_table(found["balance"]),
        "",
        *_duplicate_lines(found["duplicates"]),
        *_order_lines(found["order"]),
        "",
        f"verdict: {found['verdict'].upper()}",
        *(f"  - {reason}" for reason in found["reasons"]),
    ]
    return "\n".join(lines)


def _cell(one: Mapping[str, Any], kind: str) -> str:
    if one["auroc"] is None:
        return "too few"
    return interval(one) + (" *" if leaks(one, kind) else "  ")


def _probe_table(probes: Mapping[str, Any]) -> Iterator[str]:
    rows = {"all fakes": {kind: found["overall"] for kind, found in probes.items()}}
    for name in probes["container"]["generators"]:
        rows[name] = {kind: found["generators"][name] for kind, found in probes.items()}
    width = max(20, *(len(name) + 2 for name in rows))
    yield f"{'':{width}}{'images':>8}" + "".join(f"{_TITLES[kind]:>25}" for kind in probes)
    yield f"{'photographs':{width}}{probes['container']['overall']['real']:>8}"
    for name, row in rows.items():
        images = row["container"]["fake"]
        yield f"{name:{width}}{images:>8}" + "".join(f"{_cell(one, kind):>25}" for kind, one in row.items())


def _family_table(probes: Mapping[str, Any]) -> Iterator[str]:
    for kind, found in probes.items():
        if not found["families"]:
            continue
        yield f"{_TITLES[kind]}, each part by itself, all fakes"
        for name, one in found["families"].items():
            yield f"  {name:22}{one['reason'] if one['auroc'] is None else _cell(one, kind)}"
        for one in found["features"][:3] if leaks(found["overall"], kind) else ():
            yield f"    {one['feature']}: alone {one['auroc']:.3f}; median {one['real']} real, {one['fake']} fake"


def _origin_table(origins: Mapping[str, Any]) -> Iterator[str]:
    if not origins:
        return
    yield "photographs of each source against the other photographs: pixel statistics"
    for name, one in origins.items():
        by = f" by {', '.join(carriers(one, 'pixels'))}" if leaks(one, "pixels") else ""
        yield f"  {name or '(none given)'} ({one['images']}): {_cell(one, 'pixels').strip()}{by}"
    yield ""


def _balance_table(balance: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'images (all of them)':24}" + "".join(f"{split:>12}" for split in balance)
    names = [name for entry in balance.values() for name in entry["generators"]]
    for name in dict.fromkeys(names):
        cells = [entry["generators"][name] for entry in balance.values()]
        if any(cells):
            yield f"  {name:22}" + "".join(f"{cell:>12}" for cell in cells)
    shares = [f"{entry['real'] / entry['images']:.1%}" for entry in balance.values()]
    yield f"  {'photographs':22}" + "".join(f"{share:>12}" for share in shares)


def _duplicate_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"duplicates among the {found['images']} looked at: {found['exact']} pairs of equal pixels "
        f"({found['exact_across_splits']} across splits, {found['exact_real_and_fake']} real and fake), "
        f"{found['near']} near-duplicates ({found['near_across_splits']} across splits, "
        f"{found['near_real_and_fake']} real and fake)"
    )
    if found["whole"]:
        whole = found["whole"]
        yield (
            f"  among all sources, found when sharding: {whole['exact']} equal ({whole['exact_across_splits']} across "
            f"splits), {whole['near']} near ({whole['near_across_splits']} across splits)"
        )


def _order_lines(order: Mapping[str, Any]) -> Iterator[str]:
    for split, entry in order["splits"].items():
        said = "mixed" if entry["mixed"] else "NOT MIXED"
        if entry["equal_neighbours"] is not None:
            yield (
                f"order of {split}: {said}; {entry['equal_neighbours']:.1%} of neighbours are of one generator, "
                f"{entry['expected']:.1%} expected"
            )
    if not order["splits"]:
        yield "order: sources lie folder by folder; launch/shard.py mixes them, so it is not judged"
    if (counting := order["counting"]) is not None:
        yield (
            f"label order: classes are read from names; counting them in each folder would have given "
            f"{counting['shifted_images']} of {counting['images']} images another object"
        )
    if (names := order["names"]) is not None:
        wrong = names["real_fake_wrong"], names["generator_wrong"], names["object_wrong"]
        yield (
            f"labels against file names: {names['images']} compared; wrong: {wrong[0]} real/fake, "
            f"{wrong[1]} generator, {wrong[2]} object"
        )
