"""A small conversation set, the flags of a short finetuning run on it, and what the run logged."""

import json
from pathlib import Path

import pytest
from PIL import Image

LORA = [
    "--tune.language",
    "lora",
    "--tune.lora_rank",
    "4",
    "--tune.lora_alpha",
    "8",
    "--tune.lora_dropout",
    "0",
]
PARTIAL = ["--tune.vision", "partial", "--tune.vision_from_layer", "1"]


def write_conversations(folder: Path, count: int = 40) -> None:
    """`count` conversations and 8 for validation, every third without an image: so batches of text alone occur."""
    records = []
    for number in range(count + 8):
        fake = number % 2
        answer = f"This is a {'fake' if fake else 'real'} image." + " It is a picture." * (number % 4)
        turns = [("<image>\nIs this image real or fake?", answer)]
        record = {"id": str(number), "image": f"{number}.png"}
        if number % 3 == 0:
            turns = [("What is a photograph?", "A picture."), ("Is it real?", answer)]
            record = {"id": str(number)}
        else:
            colour = (20 * (number % 12), 200 * fake, 90)
            Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        said = [
            {"from": who, "value": text}
            for turn in turns
            for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        records.append({**record, "conversations": said})
    (folder / "train.json").write_text(json.dumps(records[:count]))
    (folder / "val.json").write_text(json.dumps(records[count:]))


def finetuning_flags(conversations: Path, folder: Path, stage: int = 2, *more: str) -> list[str]:
    """Six steps of 8, validated and saved at 3 and 6."""
    settings = {
        "data.conversations": conversations / "train.json",
        "data.val": conversations / "val.json",
        "data.generate.images": 0,
        "train.steps": 6,
        "train.global_batch": 8,
        "train.micro_batch": 1,
        "train.validate_every": 3,
        "optim.connector_lr": 1e-3,
        "optim.weight_decay": 0.1,
        "evaluate.benchmarks": "[]",
        "log.every": 1,
        "log.wandb": "off",
        "run.dir": folder,
        "deepspeed": f"configs/deepspeed/zero{stage}.json",
    }
    return [*(word for key, value in settings.items() for word in (f"--{key}", str(value))), *more]


def lines(folder):
    if not (folder / "metrics.jsonl").is_file():
        return []
    text = (folder / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in record.items() if key != "perf"} for record in records]


def losses(folder):
    return [(line["kind"], line["step"], line["loss"]) for line in lines(folder)]


def assert_equal_losses(found, expected, tolerance=1e-5):
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one[2] == pytest.approx(other[2], abs=tolerance), one
