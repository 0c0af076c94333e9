"""From a checkpoint and shards to predictions, metrics with intervals, calibrations and comparisons.

A split's predictions are one Parquet table, from which every metric is computed.

Public names:
    `evaluate.evaluate_checkpoint`: predict a split; write predictions.parquet and metrics.json.
    `metrics.compute_metrics`: the content of metrics.json, from a predictions table.
    `metrics_text.format_metrics`: metrics.json as text for a terminal.
    `sections`: the metrics themselves, one family in each file.
    `compare.compare`, `compare.compare_evaluations`: two detectors on the same images.
    `calibrate.calibrate_checkpoint`: fit a calibration on a split and save it.
    `calibration.Calibration`, `calibration.load_calibration`: calibrated P(fake) and verdicts.
    `predictions.read_predictions`, `predictions.build_table`: the predictions table.
    `split_inference.predict_split`: run a checkpoint over a split, on any number of processes.
    `open_set.compute_open_set`: rejecting images of generators never seen.
"""
