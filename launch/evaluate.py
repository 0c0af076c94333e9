r"""Evaluate a checkpoint on one split of a shard folder.

    telltale evaluate --checkpoint runs/quickstart/best.pt --data data/quickstart --split test \
        --output runs/quickstart/evaluation

Writes predictions.parquet (one row per image) and metrics.json into the output folder and
prints a table of errors; with --report also report.html, one page that needs no network, and
report.md. Runs under torchrun too, one process per GPU.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.config.parser import Parser
from engines.runtime.command import run_command
from engines.runtime.wandb_mode import WANDB_HELP, WANDB_MODES, sends_results


def make_parser() -> Parser:
    parser = Parser("evaluate", __doc__)
    add = parser.add_argument_group("Input and output").add_argument
    add("--checkpoint", required=True, help="RUN/best.pt or a file of RUN/checkpoints/")
    add("--data", required=True, help="folder written by telltale shard")
    add("--split", required=True, help="train, val or test")
    add("--output", required=True, help="folder for predictions.parquet and metrics.json")
    add = parser.add_argument_group("Prediction").add_argument
    add(
        "--batch",
        type=int,
        default=None,
        help="images per forward pass (default: 4 times the training's, on a GPU at least 256 of 224 px)",
    )
    add("--mirror", action="store_true", help="predict mirror images too and average; twice the work")
    add(
        "--other-codec",
        action="store_true",
        help="accept shards of another codec policy than the checkpoint's; metrics.json records it",
    )
    add("--verify", action="store_true", help="check the SHA-256 of every shard first")
    add = parser.add_argument_group("Report").add_argument
    add("--report", action="store_true", help="write report.html and report.md too")
    add("--protocols", nargs="*", default=[], help="folders of telltale protocol, shown in the report")
    add(
        "--pictures",
        type=int,
        default=2,
        help="images per generator and outcome in the report's gallery; 0: none",
    )
    add("--wandb", choices=WANDB_MODES, default="auto", help=WANDB_HELP)
    add = parser.add_argument_group("Metrics").add_argument
    add("--resamples", type=int, default=1000, help="bootstrap resamples behind the intervals")
    add("--held-out", default="", help="generators that the model was not trained on, separated by commas")
    add("--groups", default="", help="CSV of path and group: images that belong together, for the intervals")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)

    from engines.evaluate.evaluate import METRICS, PREDICTIONS, evaluate_checkpoint
    from engines.evaluate.metrics_text import format_metrics

    if options.resamples < 1:
        parser.error(f"--resamples is {options.resamples}, expected at least 1")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch is {options.batch}, expected at least 1")
    if options.pictures < 0:
        parser.error(f"--pictures is {options.pictures}, expected 0 or more")
    if options.protocols and not options.report:
        parser.error("--protocols are shown in the report: add --report")

    from engines.runtime.distributed import die_with_launcher

    die_with_launcher()
    held_out = [name for name in options.held_out.split(",") if name]
    metrics = evaluate_checkpoint(**{key: options[key] for key in _KEYS}, held_out=held_out)
    if metrics is not None:
        print(f"{options.checkpoint} on {options.data}, {options.split} split")
        print(format_metrics(metrics))
        folder = Path(options.output)
        print(f"\nresults: {folder / METRICS}, {folder / PREDICTIONS}")
        if options.report:
            from engines.report.report import report_evaluation

            named = {
                key: options[key]
                for key in ("checkpoint", "data", "split", "output", "protocols", "pictures")
            }
            print(f"report: {report_evaluation(**named)}")
        if sends_results(options.wandb):
            from engines.report.wandb_evaluation import send_evaluation

            named = {key: options[key] for key in ("checkpoint", "data", "split", "pictures", "report")}
            send_evaluation(folder, options.wandb, metrics, **named)
    return 0


_KEYS = (
    "checkpoint",
    "data",
    "split",
    "output",
    "batch",
    "mirror",
    "other_codec",
    "verify",
    "groups",
    "resamples",
)

if __name__ == "__main__":
    run_command(main)
