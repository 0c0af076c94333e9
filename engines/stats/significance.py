"""Exact tests and intervals of counts, from SciPy."""

from scipy.stats import binomtest


def mcnemar_p(fixed: int, broken: int) -> float:
    """The two-sided exact McNemar test: a binomial test of the items that only one side has right.

    Args:
        fixed, broken: how many items only the one, only the other side has right.
    """
    return float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0


def wilson(count: int, total: int) -> list[float]:
    """Wilson's 95 % interval of a share of `count` in `total` >= 1: [low, high]."""
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]
