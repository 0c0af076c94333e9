"""A benchmark run: answers, predictions table, metrics, on disk and on the screen."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dataio.core.atomic import write_text, write_with
from dataio.core.errors import UserError
from dataio.vqa.blind_baselines import kind_of
from engines.mlm.vqa_answers import Answerer, check_item_images, read_items, sentence_similarity
from engines.mlm.vqa_metrics import answer_label, compute_vqa_metrics, is_right, true_label
from models.tinyllava.checkpoint import load_tinyllava


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"--device {name}: not usable here ({reason}); expected auto, cpu, cuda or cuda:N"
        ) from None
    return device


def load_for_answers(
    model: str | Path, batch: int, device: torch.device, precision: str = "auto"
) -> Answerer:
    """A model folder (or random:tiny), ready to be asked.

    Raises:
        UserError: not a TinyLLaVA.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    disable_progress_bar()
    set_verbosity_error()  # a published config is of a type it does not know, as it should say to nobody
    try:
        loaded, processor = load_tinyllava(model, dtype=dtype)
    except ValueError as error:
        raise UserError(f"--model {' '.join(str(error).split())}") from None
    return Answerer(loaded.to(device), processor, batch=batch)


def answer_benchmark(
    answerer: Answerer, benchmark: str | Path, images: str | Path | None = None
) -> list[dict[str, Any]]:
    """All items of a file with `answer` and `p_fake`."""
    items = read_items(benchmark)
    _one_kind(items, benchmark)
    places = check_item_images(items, benchmark, images)
    answered: list[dict[str, Any]] = []
    with tqdm(total=len(items), unit=" items", disable=not sys.stderr.isatty()) as bar:
        for some in answerer.answer_all(items, places):
            answered += some
            bar.update(len(some))
    return answered


def score_answers(
    items: Sequence[Mapping[str, Any]], compare: str | Path | None = None, encoder: str | Path | None = None
) -> dict[str, Any]:
    """Metrics of answered items; see `compute_vqa_metrics`."""
    other = read_items(compare) if compare else None
    similarity = sentence_similarity(encoder) if encoder else None
    return compute_vqa_metrics(items, other=other, similarity=similarity)


def write_results(output: str | Path, items: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Path:
    """answers.json, predictions.parquet, metrics.json, the last one last; returns it.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(output)
    table = pd.DataFrame(
        {
            "sample_id": range(len(items)),
            "key": [item["id"] for item in items],
            "generator": [item.get("metadata", {}).get("generator") for item in items],
            "verdict": [true_label(item) or None for item in items],
            "verdict_pred": [answer_label(item) for item in items],
            "right": [is_right(item) for item in items],
            "p_fake": [item.get("p_fake") for item in items],
        }
    ).astype({"p_fake": "float64"})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "answers.json", json.dumps(list(items), indent=1) + "\n")
        write_with(folder / "predictions.parquet", table.to_parquet)
        write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror or error}); choose another"
        ) from None
    return folder / "metrics.json"


def _one_kind(items: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    kinds = {kind_of(item) for item in items}
    if len(kinds) > 1:
        raise UserError(
            f"{path}: holds items of several kinds ({', '.join(sorted(kinds))}); split the file by kind"
        )
