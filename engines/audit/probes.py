"""How well a small classifier separates fakes from photographs by an audit's features.

Container features are few, mostly categories, and act by thresholds ("width is 256"), so
only extremely randomized trees (Geurts, Ernst and Wehenkel 2006) are used: they need no
scaling, handle missing features, and are as accurate as boosting here in a third of its time.
Pixel statistics are many and smooth: their score is the mean probability of a logistic
regression on scaled features and of the same trees. It is the mean and not the better of the
two, because selecting afterwards would be optimistic.

All figures are out of fold: an image is scored by a model that was trained neither on it nor
on any image of its group. Intervals are percentiles of a bootstrap over groups (over images
where there are none), given those scores; they exclude the variation from the choice of folds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from engines.audit.features import CONTAINER, JPEG_ONLY, PIXELS, readable_value
from engines.stats.bootstrap import auroc_over_groups

FOLDS = 5
PROBE_RESAMPLES = 1000
TREES = 50
LEAST = 15  # groups of either class: below, folds and intervals mean nothing
LEAST_ALIKE = 5  # images of either class that suffice where all have identical features
# A leak is an interval that lies entirely above its bar. Chance is 0.5; the margin allows for
# variation that intervals miss and for several generators tested at once. Pictures of different
# subjects differ in color and detail anyway, so pixels have the wider margin.
BARS = {"container": 0.55, "pixels": 0.60}
WIDEST = 0.20  # an interval wider than this cannot exclude a leak
FEATURE_FAMILIES: Mapping[str, Mapping[str, Sequence[str]]] = {"container": CONTAINER, "pixels": PIXELS}
LISTED = 5  # single features named

_Float = NDArray[np.float64]


@dataclass(frozen=True)
class Data:
    """Features [N, F] and, per image [N], whether fake and the number of its group."""

    features: _Float
    fake: NDArray[np.bool_]
    group: NDArray[np.int64]

    def take(self, rows: NDArray[Any], columns: Sequence[int] | None = None) -> "Data":
        features = self.features[rows] if columns is None else self.features[rows][:, columns]
        return Data(features, self.fake[rows], self.group[rows])


def _models(kind: str, seed: int) -> dict[str, Any]:
    trees = ExtraTreesClassifier(TREES, min_samples_leaf=3, class_weight="balanced", random_state=seed)
    if kind == "container":
        return {"extra_trees": trees}
    linear = make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(C=0.3, class_weight="balanced", max_iter=2000),
    )
    return {"extra_trees": trees, "logistic_regression": linear}


def too_few(fake: NDArray[np.bool_], group: NDArray[np.int64]) -> str:
    """Why these images cannot be probed, or ""."""
    for name, rows in (("photographs", ~fake), ("fakes", fake)):
        images, groups = int(rows.sum()), len(np.unique(group[rows]))
        if images == 0:
            return f"no {name}"
        if groups < LEAST:
            of = f" in {groups} groups" if groups < images else ""
            return f"{images} {name}{of}, expected at least {LEAST}"
    return ""


def probe(data: Data, kind: str, *, seed: int, resamples: int = PROBE_RESAMPLES) -> dict[str, Any]:
    """Cross-validated AUROC of fakes against photographs.

    Args:
        kind: "container" or "pixels", which chooses the models.

    Returns:
        plain JSON values: auroc, low, high (None with a reason where there are too few images),
        real, fake (images), groups, and each model's own auroc.
    """
    result: dict[str, Any] = {
        "auroc": None,
        "low": None,
        "high": None,
        "real": int((~data.fake).sum()),
        "fake": int(data.fake.sum()),
        "groups": len(np.unique(data.group)),
    }
    differing = _differing(data.features)
    if not differing.any() and min(result["real"], result["fake"]) >= LEAST_ALIKE:
        # Nothing to learn from: exactly chance, and not for lack of images.
        return {**result, "auroc": 0.5, "low": 0.5, "high": 0.5, "constant": True}
    reason = too_few(data.fake, data.group)
    if reason:
        return {**result, "reason": reason}
    scores = _out_of_fold(data.take(np.arange(len(data.fake)), list(np.flatnonzero(differing))), kind, seed)
    mean = np.mean(list(scores.values()), axis=0)
    low, high = auroc_over_groups(data.fake, mean, data.group, resamples=resamples, seed=seed)
    result |= {"auroc": _auroc(data.fake, mean), "low": round(low, 4), "high": round(high, 4)}
    return {**result, "models": {name: _auroc(data.fake, values) for name, values in scores.items()}}


def _differing(features: _Float) -> NDArray[np.bool_]:
    """Which columns [F] have more than one value, nan counting as one."""
    known = np.nan_to_num(features, nan=np.inf)
    return np.asarray((known != known[:1]).any(0))


def _out_of_fold(data: Data, kind: str, seed: int) -> dict[str, _Float]:
    scores = {name: np.zeros(len(data.fake)) for name in _models(kind, seed)}
    folds: Any  # both are stratified; the first also handles single images, but slowly
    if len(np.unique(data.group)) < len(data.group):
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        parts = folds.split(data.features, data.fake, data.group)
    else:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        parts = folds.split(data.features, data.fake)
    for train, test in parts:
        if len(np.unique(data.fake[train])) < 2:  # one group has all of a class
            continue
        for name, model in _models(kind, seed).items():
            model.fit(data.features[train], data.fake[train])
            # Rounded: the last bits of a sum may depend on the machine's number of threads.
            scores[name][test] = model.predict_proba(data.features[test])[:, 1].round(9)
    return scores


def _auroc(fake: NDArray[np.bool_], scores: _Float) -> float:
    return round(float(roc_auc_score(fake, scores)), 4)


def probe_families(data: Data, jpeg: NDArray[np.bool_], kind: str, *, seed: int) -> dict[str, Any]:
    """Each family of features probed alone: {family: `probe`}.

    Families that only JPEG files have are probed on JPEG files; otherwise they repeat the format.
    """
    results, start = {}, 0
    for family, names in FEATURE_FAMILIES[kind].items():
        columns = list(range(start, start + len(names)))
        start += len(names)
        rows = np.flatnonzero(jpeg) if family in JPEG_ONLY else np.arange(len(jpeg))
        results[family] = probe(data.take(rows, columns), kind, seed=seed)
        if family in JPEG_ONLY and results[family].get("reason"):
            results[family]["reason"] += " among the JPEG files"
    return results


def single_features(data: Data, kind: str) -> list[dict[str, Any]]:
    """The most predictive single features: AUROC in either direction, and medians of both classes.

    An image without a feature counts as below all that have it.
    """
    names = [name for family in FEATURE_FAMILIES[kind].values() for name in family]
    results: list[dict[str, Any]] = []
    for column, name in enumerate(names):
        values = data.features[:, column]
        if len(np.unique(np.nan_to_num(values, nan=-np.inf))) < 2:
            continue
        auroc = _auroc(data.fake, np.nan_to_num(values, nan=-1e12))
        medians = [_median(name, values[rows]) for rows in (~data.fake, data.fake)]
        results.append(
            {
                "feature": name,
                "auroc": max(auroc, round(1 - auroc, 4)),
                "real": medians[0],
                "fake": medians[1],
            }
        )
    return sorted(results, key=lambda entry: -entry["auroc"])[:LISTED]


def _median(name: str, values: _Float) -> float | str | None:
    known = values[~np.isnan(values)]
    return readable_value(name, float(np.median(known))) if len(known) else None


def leaks(result: Mapping[str, Any], kind: str) -> bool:
    return result["low"] is not None and result["low"] > BARS[kind]


def cannot_say(result: Mapping[str, Any], kind: str) -> str:
    """Why a probe without a leak cannot exclude one, or ""."""
    if result["low"] is None:
        return str(result["reason"])
    if not leaks(result, kind) and result["high"] - result["low"] > WIDEST:
        return (
            f"AUROC {result['auroc']:.2f} [{result['low']:.2f}, {result['high']:.2f}] is too wide an interval"
        )
    return ""
