"""How much memory each GPU needs to finetune TinyLLaVA, for each ZeRO stage and number of GPUs.

    python launch/finetune_memory.py --config configs/tinyllava_lora_zero2.yaml --gpus 1,4,8

An estimate from the configuration alone: nothing is loaded, and no GPU is needed. A run makes
the same estimate before it loads anything.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from engines.config.mlm import FinetuneConfig
from engines.config.parser import Parser, parse_as, parse_int_list
from engines.runtime.command import run_command
from engines.runtime.paths import CONFIGS


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Estimate the memory that finetuning needs on each GPU.")
    parser.add_argument(
        "--config", default=str(CONFIGS / "tinyllava_lora_zero2.yaml"), help="YAML of the run"
    )
    parser.add_argument("--gpus", default="1,4,8", help="numbers of GPUs, separated by commas")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the longest conversation")
    args = parser.parse_args(argv)
    gpus = parse_int_list("--gpus", args.gpus, example="1,4,8")
    if args.length < 1:
        raise UserError(f"--length {args.length}: expected at least 1")
    config = parse_as(FinetuneConfig, [], args.config)
    from engines.mlm.memory_estimate import memory_table  # imports transformers: --help need not wait

    print(memory_table(config, gpus, args.length))
    return 0


if __name__ == "__main__":
    run_command(main)
