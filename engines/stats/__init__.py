"""Statistics that know neither shards nor checkpoints: formulas on arrays, tests and intervals.

Public names:
    `scores`: figures of a detector from truth and P(fake), such as `scores.auroc`.
    `bootstrap.resample`, `bootstrap.percentile_interval`: bootstrap intervals of many figures.
    `bootstrap.auroc_over_groups`: the interval of one AUROC over groups of images.
    `significance.mcnemar_p`, `significance.wilson`: exact tests and intervals of counts.
    `text_table.text_table`: rows as a table for a terminal or for Markdown.
"""
