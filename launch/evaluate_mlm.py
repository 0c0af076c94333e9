"""Measure a finetuned TinyLLaVA on a benchmark, or score answers that exist.

    telltale evaluate-mlm --model runs/tinyllava/model --benchmark true_false.json --output results
    telltale evaluate-mlm --answers answers.json --compare base_answers.json

Answers are greedy; a verdict also comes as P(fake) against P(real) at its token. An answer
that names no verdict counts as wrong, and is counted separately. Beside every score stands an
image-blind baseline.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from engines.config.parser import Parser
from engines.runtime.command import run_command
from engines.runtime.wandb_mode import WANDB_HELP, WANDB_MODES, sends_results


def make_parser() -> Parser:
    parser = Parser("evaluate-mlm", __doc__)
    add = parser.add_argument_group("Input and output").add_argument
    add("--model", help="folder of a model (RUN/model), of the published one, or random:tiny")
    add("--benchmark", help="JSON list of id, image, question, ground_truth")
    add("--images", help="folder the benchmark's images are in; its own by default")
    add("--answers", help="score this file's answers; no model is loaded")
    add("--compare", help="answers of another model to the same items, for McNemar's test")
    add("--output", help="folder for answers.json, predictions.parquet, metrics.json")
    add("--wandb", choices=WANDB_MODES, default="auto", help=WANDB_HELP)
    add = parser.add_argument_group("Prediction and scores").add_argument
    add("--encoder", help="local sentence encoder, for the similarity of open answers")
    add("--batch", type=int, default=8, help="questions at a time")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.answers is None and (args.model is None or args.benchmark is None or args.output is None):
        raise UserError("give --model DIR --benchmark FILE --output DIR, or --answers FILE")
    if args.answers is not None and (args.model or args.benchmark):
        raise UserError("--answers scores a file by itself; leave out --model and --benchmark")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: expected at least 1")
    from engines.mlm.vqa_answers import read_items
    from engines.mlm.vqa_benchmark import (
        answer_benchmark,
        choose_device,
        load_for_answers,
        score_answers,
        write_results,
    )
    from engines.mlm.vqa_metrics import vqa_summary

    if args.answers is not None:
        items = read_items(args.answers)
        if not any(item.get("answer") for item in items):
            raise UserError(
                f"{args.answers}: no item has an answer; is it a benchmark? give it to --benchmark"
            )
    else:
        answerer = load_for_answers(args.model, args.batch, choose_device(args.device), args.precision)
        items = answer_benchmark(answerer, args.benchmark, args.images)
    metrics = score_answers(items, args.compare, args.encoder)
    print(vqa_summary(metrics))
    if args.output:
        print(f"results: {write_results(args.output, items, metrics)}")
        if args.benchmark and sends_results(args.wandb):
            from engines.mlm.vqa_wandb import send_answers

            named = {key: args[key] for key in ("benchmark", "images", "model")}
            send_answers(Path(args.output), args.wandb, items, metrics, **named)
    return 0


if __name__ == "__main__":
    run_command(main)
