r"""Calibrate a checkpoint on the validation split and freeze its decision.

    telltale calibrate --checkpoint runs/quickstart/best.pt --data data/quickstart

Writes best.calibration.json beside best.pt: temperature and shift of the logit of P(fake), the
threshold from which an image is called AI-generated, and the band below it that is called
unsure. telltale evaluate, predict, explain and export use it from then on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.config.parser import Parser
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("calibrate", __doc__)
    add = parser.add_argument_group("Input").add_argument
    add("--checkpoint", required=True, help="RUN, RUN/best.pt or an export")
    add("--data", help="folder written by telltale shard")
    add("--predictions", help="instead: predictions.parquet of this checkpoint on the split")
    add("--split", default="val", help="what to calibrate on")
    add = parser.add_argument_group("Decision").add_argument
    add(
        "--false-alarm-rate",
        type=float,
        default=0.01,
        help="share of the split's real images that may be called AI-generated",
    )
    add(
        "--unsure",
        type=float,
        default=0.05,
        help="share of its generated images that may be called real; what lies between is unsure; "
        "1 for no such band",
    )
    add = parser.add_argument_group("Prediction").add_argument
    add("--batch", type=int, default=None, help="images per forward pass")
    add("--allow-test", action="store_true", help="let --split be test")
    add(
        "--other-codec",
        action="store_true",
        help="accept shards of another codec policy than the checkpoint's; the calibration records it",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)

    from engines.evaluate.calibrate import calibrate_checkpoint, format_calibration

    if not 0 < options.false_alarm_rate < 1:
        parser.error(f"--false-alarm-rate is {options.false_alarm_rate:g}, expected a fraction in (0, 1)")
    if not 0 <= options.unsure <= 1:
        parser.error(f"--unsure is {options.unsure:g}, expected a fraction in [0, 1]")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch is {options.batch}, expected at least 1")

    from engines.runtime.distributed import die_with_launcher

    die_with_launcher()
    done = calibrate_checkpoint(
        miss_rate=options.unsure,
        **{key: options[key] for key in _KEYS},
    )
    if done is not None:
        calibration, path = done
        print(f"{format_calibration(calibration)}\n\ncalibration: {path}")
        for note in calibration.notes:
            print(f"warning: {note}", file=sys.stderr)
    return 0


_KEYS = (
    "checkpoint",
    "data",
    "split",
    "predictions",
    "false_alarm_rate",
    "allow_test",
    "other_codec",
    "batch",
)

if __name__ == "__main__":
    run_command(main)
