"""Calibrate a checkpoint on a split, or on its predictions; the result lies beside the checkpoint."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataio.core.errors import UserError
from engines.checkpoint.contract import other_codec_error
from engines.checkpoint.files import weights_sha256
from engines.evaluate.calibration import Calibration, calibration_path, save_calibration
from engines.evaluate.calibration_fit import fit_calibration
from engines.evaluate.predictions import build_table, checkpoint_info, data_info, read_predictions
from engines.stats.significance import wilson


def calibrate_checkpoint(
    *,
    checkpoint: str,
    data: str | None = None,
    split: str = "val",
    predictions: str | None = None,
    false_alarm_rate: float = 0.01,
    miss_rate: float = 0.05,
    allow_test: bool = False,
    batch: int | None = None,
    other_codec: bool = False,
) -> tuple[Calibration, Path] | None:
    """Predict a split, fit, and write the calibration; under torchrun every rank calls this.

    Args:
        checkpoint: RUN, RUN/best.pt or an export.
        data: shard folder, of which `split` is predicted; or
        predictions: a predictions.parquet of this checkpoint on `split`.
        false_alarm_rate, miss_rate: see `fit_calibration`.
        allow_test: accept the test split; every later figure on it is then optimistic.
        batch: images per forward pass; None for the default of `predict_split`.
        other_codec: accept images of another codec policy than the checkpoint's, with a note.

    Returns:
        the calibration and its file on rank 0, None on the others.

    Raises:
        UserError: neither or both of data and predictions; the test split; predictions of
            other weights, of another split, of mirror images or of another codec policy; what
            `fit_calibration` raises.
    """
    if (data is None) == (predictions is None):
        raise UserError("calibrate on either data (shards) or predictions (a parquet file): give one of them")
    if split == "test" and not allow_test:
        raise UserError(
            "choices are made on the validation split, or the test's figures mean nothing; use val, or "
            "insist with allow_test (--allow-test)",
            field="split",
            value="test",
        )
    folder = calibration_path(checkpoint).parent
    if folder.is_dir() and not os.access(folder, os.W_OK):  # checked before an hour of predicting
        raise UserError(
            f"{folder}: cannot be written, and the calibration belongs there; copy the checkpoint"
        )
    if predictions is not None:
        table, weights = _read(checkpoint, predictions, split, other_codec)
    else:
        from engines.evaluate.split_inference import predict_split

        assert data is not None
        arrays = predict_split(
            checkpoint, data, split, batch=batch, calibrated=False, other_codec=other_codec
        )
        if arrays is None:
            return None
        table = build_table(arrays)
        weights = arrays.checkpoint["weights_sha256"]
    calibration = fit_calibration(
        table["p_fake"].to_numpy(),
        [name != "nature" for name in table["generator"].to_pylist()],
        false_alarm_rate=false_alarm_rate,
        miss_rate=miss_rate,
        split=split,
        weights_sha256=weights,
    )
    described = data_info(table)
    notes = [*calibration.notes, *_data_notes(described)]
    calibration = replace(calibration, data=described, notes=tuple(notes))
    return calibration, save_calibration(checkpoint, calibration)


def _data_notes(described: dict[str, Any]) -> list[str]:
    if not described:
        return ["the predictions do not say which data and codec policy they are of; evaluate again to check"]
    if described.get("codec_differences"):
        differences = "; ".join(described["codec_differences"])
        return [
            f"fitted on images of another codec than the training's ({differences}): not for telltale predict"
        ]
    return []


def _read(checkpoint: str, predictions: str, split: str, other_codec: bool) -> tuple[pa.Table, str]:
    """The table of this checkpoint's predictions on this split, and the SHA-256 of its weights."""

    def wrong(message: str) -> UserError:
        return UserError(message, field="predictions", value=predictions)

    from engines.checkpoint.load_model import load_model

    weights = weights_sha256(load_model(checkpoint)[0].state_dict())
    table = read_predictions(predictions)
    info = checkpoint_info(table)
    if "weights_sha256" not in info or "split" not in info:
        raise wrong(
            "does not say which weights and split it is of; write it again with telltale evaluate, or "
            "calibrate on shards"
        )
    if info["weights_sha256"] != weights:
        raise wrong(
            f"was predicted by other weights than {checkpoint} holds; evaluate again, or calibrate on shards"
        )
    if info["split"] != split:
        raise wrong(
            f"is of the {info['split']} split, expected {split}; choose the split {info['split']}, or give "
            "other predictions"
        )
    if info.get("mirror"):
        raise wrong(
            "was predicted with --mirror, which telltale predict does not do; evaluate again without it"
        )
    described = data_info(table)
    if described.get("codec_differences") and not other_codec:
        data, differences = str(described.get("folder")), described["codec_differences"]
        raise other_codec_error(data, checkpoint, differences)
    return table, weights


def format_calibration(calibration: Calibration) -> str:
    """A fitted calibration as text for a terminal."""
    counts, low = calibration.counts, calibration.unsure[0]
    band = (
        f"unsure from {low:.4f}: {counts['unsure_real']} real and {counts['unsure_fake']} generated images\n"
        if low < calibration.threshold
        else "unsure: never, the thresholds leave no band\n"
    )
    false_alarms = _share(counts["false_alarms"], counts["real"], "real")
    misses = _share(counts["misses"], counts["fake"], "generated")
    return (
        f"{calibration.split} split: {counts['real']} real and {counts['fake']} generated images\n"
        f"temperature {calibration.temperature:.4f}, shift {calibration.shift:+.4f}\n"
        f"NLL {calibration.before['nll']:.4f} -> {calibration.after['nll']:.4f}, "
        f"ECE {calibration.before['ece']:.4f} -> {calibration.after['ece']:.4f}\n"
        "verdicts by calibrated P(fake), and their counts on this split:\n"
        f"AI-generated from {calibration.threshold:.4f}: {false_alarms}; "
        f"target {calibration.false_alarm_rate:.2%} at most\n"
        f"{band}real below {min(low, calibration.threshold):.4f}: {misses}"
    )


def _share(count: int, total: int, kind: str) -> str:
    low, high = wilson(count, total)
    return f"{count} of {total} {kind} images ({count / total:.2%}, 95 % interval {low:.2%} to {high:.2%})"
