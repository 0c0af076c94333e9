"""The metric sections there are: one for each file of the package."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from engines.evaluate import sections
from engines.evaluate.sections.base import Metric, MetricSection, Show


@cache
def all_sections() -> tuple[MetricSection, ...]:
    """Every file's `SECTION`, in the order of metrics.json."""
    names = [module.name for module in iter_modules(sections.__path__)]
    modules = [
        import_module(f"{sections.__name__}.{name}") for name in names if name not in ("base", "registry")
    ]
    return tuple(sorted((module.SECTION for module in modules), key=lambda section: section.place))


@cache
def all_metrics() -> dict[str, Metric]:
    """Every declared metric by key; those with intervals first, in the order of the intervals."""
    metrics = [metric for section in all_sections() for metric in section.metrics]
    metrics.sort(key=lambda metric: 1_000_000 if metric.resampled is None else metric.resampled.place)
    return {metric.key: metric for metric in metrics}


def averaged_keys() -> tuple[str, ...]:
    """The metrics that have a mean over generators."""
    return tuple(key for key, metric in all_metrics().items() if metric.averaged)


def shown_in(place: Callable[[Metric], Show | None]) -> list[tuple[Metric, str]]:
    """The metrics that are shown in one place, with their titles there, in its order.

    Args:
        place: such as `lambda metric: metric.card`.
    """
    shown = [(show, metric) for metric in all_metrics().values() if (show := place(metric)) is not None]
    return [(metric, show.title) for show, metric in sorted(shown, key=lambda pair: pair[0].place)]
