"""The results of a finetuning run: the merged model, its adapter, its answers to benchmarks."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlavaProcessor

from dataio.core.log import log
from engines.config.mlm import FinetuneConfig
from engines.mlm.model import TORCH_DTYPES, merge_adapters
from engines.mlm.trainer import load_unfrozen
from engines.mlm.vqa_benchmark import answer_benchmark, load_for_answers, score_answers, write_results
from engines.mlm.vqa_metrics import vqa_summary
from engines.mlm.vqa_wandb import send_answers
from models.tinyllava.checkpoint import load_tinyllava, open_model_folder, read_unused_head, save_tinyllava
from models.tinyllava.model import without_zero3_init


def write_model(
    config: FinetuneConfig, checkpoint: Path, folder: Path, processor: LlavaProcessor, precision: str
) -> None:
    """Write RUN/model with Hugging Face's names and merged adapters, and RUN/adapter if there is one.

    The model is read from the checkpoint's files on the host, so the result does not depend on
    the ZeRO stage.
    """
    source = open_model_folder(config.model.weights)
    adapter = (checkpoint / "adapter_config.json").is_file()
    with without_zero3_init():  # rank 0 alone loads, so nothing may be partitioned
        if adapter:
            # Merge in fp32, so that the sum is rounded once.
            base, _ = load_tinyllava(config.model.weights, dtype=torch.float32)
            load_unfrozen(base, checkpoint)
            model: Any = merge_adapters(PeftModel.from_pretrained(base, checkpoint)).to(
                TORCH_DTYPES[precision]
            )
            shutil.copytree(
                checkpoint,
                folder / "adapter",
                dirs_exist_ok=True,
                ignore=lambda where, names: [n for n in names if not n.startswith(("adapter_", "trained_"))],
            )
        else:
            model, _ = load_tinyllava(checkpoint, dtype=TORCH_DTYPES[precision])
    model.config.use_cache = True
    temporary = folder / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_tinyllava(model, processor, temporary, read_unused_head(source))
    shutil.rmtree(folder / "model", ignore_errors=True)
    os.replace(temporary, folder / "model")


def answer_benchmarks(config: FinetuneConfig, folder: Path, device: torch.device) -> None:
    """Answer `evaluate.benchmarks` with the finished model: prints a table, writes RUN/vqa/NAME."""
    answerer = load_for_answers(folder / "model", config.evaluate.batch, device)
    for benchmark, name in zip(
        config.evaluate.benchmarks, result_names(config.evaluate.benchmarks), strict=True
    ):
        items = answer_benchmark(answerer, benchmark)
        metrics = score_answers(items)
        log.info(f"\n{name}\n{vqa_summary(metrics)}")
        log.info(f"results: {write_results(folder / 'vqa' / name, items, metrics)}")
        send_answers(
            folder / "vqa" / name,
            config.log.wandb,
            items,
            metrics,
            benchmark=benchmark,
            images=None,
            model=folder / "model",
        )


def result_names(benchmarks: Sequence[str]) -> list[str]:
    """A folder name for each benchmark: its file's stem, with parent folders until all are distinct."""
    paths = [Path(os.path.abspath(benchmark)).with_suffix("").parts[1:] for benchmark in benchmarks]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = ["_".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    # The same file twice: both results are equal.
    return ["_".join(parts[-1:]) for parts in paths]
