"""A benchmark's answers, read back from what Weights & Biases gets of them."""

import numpy as np
import wandb
from PIL import Image

from engines.mlm.vqa_metrics import compute_vqa_metrics
from engines.mlm.vqa_wandb import send_answers
from tests.wandb_file import read_wandb_file


def test_answers_go_with_their_images_the_wrong_ones_first(tmp_path, monkeypatch):
    for name in ("API_KEY", "MODE", "NAME", "RUN_GROUP"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    output, model = tmp_path / "RUN" / "vqa" / "tf", tmp_path / "RUN" / "model"
    output.mkdir(parents=True)
    model.mkdir()
    items = []
    for number in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)).save(tmp_path / f"{number}.png")
        items.append(
            {
                "id": f"item {number}",
                "image": f"{number}.png",
                "question": "Is this image real?",
                "ground_truth": "Real" if number % 2 else "Fake",
                "answer": "Real",
                "p_fake": number / 4,
            }
        )
    metrics = compute_vqa_metrics(items)
    named = {"benchmark": tmp_path / "tf.json", "images": None, "model": model}
    send_answers(output, "auto", items, metrics, **named)  # no account
    assert list(output.iterdir()) == []
    send_answers(output, "offline", items, metrics, **named)
    wandb.teardown()
    file = read_wandb_file(output)
    assert (file.run.job_type, file.run.run_group, file.run.display_name) == ("benchmark", "RUN", "RUN tf")
    assert file.summary["error"] == metrics["error"] == 0.5 and file.config["kind"] == metrics["kind"]
    _, rows, files = file.table("answers")
    assert [(row[1], row[5]) for row in rows] == [
        ("item 0", False),
        ("item 2", False),
        ("item 1", True),
        ("item 3", True),
    ]
    assert [row[6] for row in rows] == [0.0, 0.5, 0.25, 0.75]
    for row in rows:
        with Image.open(files[row[0]["path"]]) as picture:
            assert picture.getpixel((0, 0)) == (60 * int(row[1][-1]),) * 3


def test_at_most_100_are_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    item = {"image": "a.png", "question": "Is this image real?", "ground_truth": "Fake", "answer": "Fake"}
    items = [{"id": str(place), **item} for place in range(150)]
    output = tmp_path / "out"
    output.mkdir()
    named = {"benchmark": tmp_path / "tf.json", "images": tmp_path, "model": "random:tiny"}
    send_answers(output, "offline", items, compute_vqa_metrics(items), **named)
    wandb.teardown()
    assert len(read_wandb_file(output).table("answers")[1]) == 100
