"""Exact tests and intervals of counts, from SciPy."""

from scipy.stats import binomtest


def mcnemar_p(fixed: int, broken: int) -> float:
    """The p-value of the two-sided exact McNemar test.

    It is a binomial test on the items that exactly one of two sides has right.

    Args:
        fixed, broken: the number of items that only the first and only the second has right.
    """
    return float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0


def wilson(count: int, total: int) -> list[float]:
    """Wilson's 95 % interval [low, high] of the share `count` / `total`; total >= 1."""
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]
