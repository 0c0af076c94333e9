"""What a training leaves in its folder, and whether two left the same."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without timings; a line still being written is left out."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in record.items() if key != "perf"} for record in records]


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "exit.json").read_text())


def assert_same(folder: Path, reference: Path) -> None:
    found, expected = (load_file(place / "final.safetensors") for place in (folder, reference))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert lines(folder) == lines(reference)
    assert outcome(folder)["code"] == 0


def steps(folder: Path) -> list[int]:
    """The training steps of metrics.jsonl, in its order."""
    return [line["step"] for line in lines(folder) if line["kind"] == "train"]
