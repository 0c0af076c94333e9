"""The report of an evaluation: report.html, one page that needs no network, and report.md.

Public names:
    `report.report_evaluation`: the report of an evaluation's folder.
    `page.write_report`, `page.Context`: the same from a table and metrics in memory.
    `wandb_evaluation.send_evaluation`: an evaluation for Weights & Biases.
    `plots`: its figures, as SVG.
"""
