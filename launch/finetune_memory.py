"""How much memory each GPU needs to finetune TinyLLaVA, for each ZeRO stage and number of GPUs.

    telltale finetune-memory --config configs/tinyllava_lora_zero2.yaml --gpus 1,4,8

An estimate from the configuration alone: nothing is loaded, and no GPU is needed. A run makes
the same estimate before it loads anything.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from engines.config.parser import Parser, parse_as, parse_int_list
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("finetune-memory", __doc__)
    parser.add_argument("--config", default="configs/tinyllava_lora_zero2.yaml", help="YAML of the run")
    parser.add_argument("--gpus", default="1,4,8", help="numbers of GPUs, separated by commas")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the longest conversation")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)

    from engines.config.mlm import FinetuneConfig

    gpus = parse_int_list("--gpus", args.gpus, example="1,4,8")
    if args.length < 1:
        raise UserError(f"--length {args.length}: expected at least 1")
    config = parse_as(FinetuneConfig, [], args.config)
    from engines.mlm.memory_estimate import (
        finetuning_memory_table,  # imports transformers: --help need not wait
    )

    print(finetuning_memory_table(config, gpus, args.length))
    return 0


if __name__ == "__main__":
    run_command(main)
