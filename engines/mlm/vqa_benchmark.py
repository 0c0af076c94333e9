"""Run a benchmark: answers, the table of predictions and metrics, written to a folder."""

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
from dataio.core.errors import UserError, one_line, writing
from dataio.vqa.blind_baselines import kind_of
from engines.mlm.model import TORCH_DTYPES
from engines.mlm.vqa_answers import Answerer, check_item_images, read_items, sentence_similarity
from engines.mlm.vqa_metrics import answer_label, compute_vqa_metrics, is_right, true_label
from engines.runtime.precision import resolve_precision
from models.tinyllava.checkpoint import load_tinyllava


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        UserError: the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"not usable here ({one_line(error)[:150]}); expected auto, cpu, cuda or cuda:N",
            field="device",
            value=name,
        ) from None
    return device


def load_for_answers(
    model: str | Path, batch: int, device: torch.device, precision: str = "auto"
) -> Answerer:
    """Load a model folder (or random:tiny) to answer questions.

    Args:
        batch: questions at a time. precision: of the weights; "auto" is bf16 on a GPU.

    Raises:
        UserError: not a TinyLLaVA.
    """
    dtype = TORCH_DTYPES[resolve_precision(precision, device)]
    disable_progress_bar()
    set_verbosity_error()  # transformers warns about the published model_type, which we handle
    try:
        loaded, processor = load_tinyllava(model, dtype=dtype)
    except ValueError as error:
        # The error begins with the folder, which `value` repeats.
        text = one_line(error).removeprefix(f"{model}: ")
        raise UserError(text, field="model", value=model) from None
    return Answerer(loaded.to(device), processor, batch=batch)


def answer_benchmark(
    answerer: Answerer, benchmark: str | Path, images: str | Path | None = None
) -> list[dict[str, Any]]:
    """The items of a benchmark file with `answer` and `p_fake` added."""
    items = read_items(benchmark)
    _refuse_mixed_kinds(items, benchmark)
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
    """Write answers.json, predictions.parquet and, last, metrics.json.

    Returns:
        the path of metrics.json.

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
    with writing(folder, field="output"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "answers.json", json.dumps(list(items), indent=1) + "\n")
        write_with(folder / "predictions.parquet", table.to_parquet)
        write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return folder / "metrics.json"


def _refuse_mixed_kinds(items: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    kinds = {kind_of(item) for item in items}
    if len(kinds) > 1:
        raise UserError(
            f"{path}: items of several kinds ({', '.join(sorted(kinds))}); split the file by kind"
        )
