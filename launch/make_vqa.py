"""Make finetuning conversations and benchmarks from labeled images.

    telltale make-vqa --shards data/genimage --output data/vqa
    telltale make-vqa --manifest labels.csv --root images --output data/vqa

Conversations come from the train and val splits, the true/false and multiple-choice
benchmarks from the test split, without images or groups that were trained on. A benchmark
on which an image-blind baseline beats chance is refused.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from dataio.sources.remote_path import is_url
from dataio.vqa.questions import QUESTION_FORMATS, VqaSizes, images_of_manifest, images_of_shards, write_vqa
from engines.config.parser import Parser
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("make-vqa", __doc__)
    add = parser.add_argument_group("Input and output").add_argument
    add("--shards", help="folder written by telltale shard")
    add("--manifest", help="CSV of path, generator, object[, split, group]")
    add("--root", help="folder the CSV's paths start in; the CSV's own by default")
    add("--real", help="the CSV's generators that are photographs, as in 'real,0'")
    add("--output", required=True, help="folder of the JSON files")
    add = parser.add_argument_group("Questions").add_argument
    add("--train", type=int, default=VqaSizes.train, help="finetuning conversations")
    add("--val", type=int, default=VqaSizes.val, help="validation conversations")
    add("--true-false", type=int, default=VqaSizes.true_false, help="true/false items")
    add("--multiple-choice", type=int, default=VqaSizes.multiple_choice, help="multiple-choice items")
    add("--formats", default=",".join(QUESTION_FORMATS), help="of the conversations: explain, short, choice")
    add("--seed", type=int, default=0, help="seed of the questions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if (args.shards is None) == (args.manifest is None):
        raise UserError("give --shards DIR or --manifest FILE.csv, one of them")
    if args.real is not None and args.manifest is None:
        raise UserError("--real belongs to --manifest; remove it")
    formats = tuple(args.formats.split(","))
    if not formats or set(formats) - set(QUESTION_FORMATS):
        raise UserError(f"--formats {args.formats}: expected some of {','.join(QUESTION_FORMATS)}")
    for name in ("train", "val", "true_false", "multiple_choice"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more")
    needed = {
        "train": args.train > 0,
        "val": args.val > 0,
        "test": args.true_false + args.multiple_choice > 0,
    }
    if args.shards is not None:
        if is_url(args.shards):
            raise UserError(
                f"--shards {args.shards}: conversations name images in local tars; copy the shards to a folder first"
            )
        images = {split: images_of_shards(args.shards, split) if on else [] for split, on in needed.items()}
    else:
        images = images_of_manifest(args.manifest, args.root, real=args.real)
    plan = VqaSizes(
        train=args.train,
        val=args.val,
        true_false=args.true_false,
        multiple_choice=args.multiple_choice,
        formats=formats,
        seed=args.seed,
    )
    summary = write_vqa(images, args.output, plan)
    for name, count in summary["counts"].items():
        print(f"{name}: {count}")
    for kind, scores in summary["blind"].items():
        shares = ", ".join(f"{rule} {score:.1%}" for rule, score in scores.items())
        print(f"{kind}, right without seeing the image: {shares}")
    if summary["left_out_of_test"]:
        print(f"left out of the benchmarks, since trained on: {summary['left_out_of_test']} images")
    print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
