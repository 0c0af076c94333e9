"""The metrics of metrics.json, one family in each file.

Every file of this package but `base` and `registry` defines `SECTION`, a `base.MetricSection`:
what it computes for all images, for each generator and for each object, which of its figures
get intervals, and where `telltale compare`, the report and the terminal show them. A new
metric is a new file; `registry.all_sections` finds it.

Public names: `base.MetricSection`, `base.Metric`, `base.Resampled`, `base.Show` declare a
section; `base.SectionValues` collects its values; `registry.all_sections` and
`registry.all_metrics` list what is declared.
"""
