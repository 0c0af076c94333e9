"""launch/protocol.py: cells, tasks, kills, failures; raw equals evaluate.py bit for bit."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb

from dataio.core.errors import UserError
from dataio.images.codec import preset_policy
from dataio.images.stored import jpeg_quality
from dataio.layouts.synthetic import SyntheticLayout, write_synthetic
from dataio.sharding.job import write_shards
from dataio.shards.shard_set import ShardSet
from engines.checkpoint import files as checkpoints
from engines.config.detector import from_dict
from engines.config.protocol import parse_command
from engines.evaluate.evaluate import evaluate_checkpoint
from engines.evaluate.metrics import compute_metrics
from engines.evaluate.predictions import probabilities, read_predictions
from engines.experiments.protocol import run_protocol
from engines.experiments.protocol_cells import open_protocol
from models.detector.dual_head import DualHead
from tests.support import environment, flags, wait_until
from tests.wandb_file import read_wandb_file

ROBUST = "protocol: robustness\noperations: {jpeg: [90, 20], noise: [5]}\nchains: [2]\n"
ALIGNED = "protocol: aligned\nsize: 24\n"
UNREADABLE = 1


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Originals with one broken test image, their default and kept shards, and a checkpoint."""
    folder = tmp_path_factory.mktemp("protocol")
    write_synthetic(folder / "source", images=160, size=32, seed=0)
    broken = sorted((folder / "source").glob("**/val/ai/*"))[0]
    broken.write_bytes(broken.read_bytes()[:300])
    layout = SyntheticLayout(folder / "source", val_fraction=0.1)
    manifest = write_shards(layout, folder / "shards", preset_policy("default", 32), quiet=True)
    write_shards(layout, folder / "kept", preset_policy("keep"), samples_per_shard=7, quiet=True)
    _write_checkpoint(folder / "best.pt", manifest, manifest["generators"])
    _write_checkpoint(folder / "other.pt", manifest, ["nature", "adm"])
    return folder


def _write_checkpoint(path, manifest, generators):
    config = {"data": {"size": 32, "eval_crop": 1.0}, "model": {"backbone": "resnet18", "stem": "pooled"}}
    torch.manual_seed(0)
    model = DualHead(from_dict(config).model, generators, manifest["objects"])
    state = {
        "format": checkpoints.FORMAT,
        "version": checkpoints.VERSION,
        "step": 5,
        "model": checkpoints.cpu_state(model),
        "labels": {"generators": list(generators), "objects": manifest["objects"]},
        "codec": manifest["codec"],
        "layout": manifest["layout"],
        "config": config,
    }
    checkpoints.save(path, state)


@pytest.fixture
def words(work, tmp_path):
    """A command's words after protocol.py, with a file of this text."""

    def make(text, output, *more, source=True, checkpoint="best.pt"):
        path = tmp_path / "protocol.yaml"
        path.write_text(text)
        found = [str(path), "--output", str(output), "--workers", "1"]
        found += ["--checkpoint", str(work / checkpoint)] if checkpoint else []
        return [
            *found,
            *(["--layout", "synthetic", "--source", str(work / "source")] if source else []),
            *more,
        ]

    return make


@pytest.fixture(scope="module")
def whole(work):
    """What one undisturbed process makes of ROBUST on a few images."""
    (work / "whole.yaml").write_text(ROBUST)
    arguments = [
        str(work / "whole.yaml"),
        "--output",
        str(work / "whole"),
        "--workers",
        "1",
        "--images",
        "12",
    ]
    arguments += [
        "--checkpoint",
        str(work / "best.pt"),
        "--layout",
        "synthetic",
        "--source",
        str(work / "source"),
    ]
    return SimpleNamespace(output=work / "whole", text=run(arguments), arguments=arguments)


@pytest.fixture
def start(repo_root, tmp_path):
    def call(arguments):
        command = [sys.executable, str(repo_root / "launch" / "protocol.py"), *arguments]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return call


def run(arguments):
    return run_protocol(parse_command(arguments))


def result_of(output):
    return json.loads((output / "protocol.json").read_text())


def test_raw_is_plain_evaluation_on_default_shards_bit_for_bit(words, work, tmp_path):
    text = run(words(ROBUST, tmp_path / "out", "--keep_shards", "true"))
    checkpoint, plain = str(work / "best.pt"), tmp_path / "plain"
    metrics = evaluate_checkpoint(
        checkpoint=checkpoint, data=str(work / "shards"), split="test", output=str(plain)
    )
    cells = tmp_path / "out" / "cells"
    ours, theirs = (read_predictions(f / "predictions.parquet") for f in (cells / "raw", plain))
    assert np.array_equal(probabilities(ours), probabilities(theirs)) and len(ours) > 15
    for column in ("generator", "object", "p_fake", "object_pred"):
        assert ours[column].equals(theirs[column])
    raw = result_of(tmp_path / "out")["raw"]
    assert metrics is not None and raw["auroc"] == metrics["overall"]["auroc"]
    assert raw["accuracy"] == 1 - metrics["overall"]["real_fake_error"]

    merged = result_of(tmp_path / "out")
    assert [cell["name"] for cell in merged["cells"]] == ["raw", "jpeg-90", "jpeg-20", "noise-5", "chain-2"]
    for cell in merged["cells"]:
        # The same images in every cell, and the broken one counted in each.
        assert cell["counts"]["images"] == len(ours) and cell["counts"]["unreadable"] == UNREADABLE
        assert cell["counts"]["left_out"] == 0
        table = read_predictions(cells / cell["name"] / "predictions.parquet")
        assert cell["metrics"]["auroc"] == compute_metrics(table)["overall"]["auroc"]
    p = {
        name: probabilities(read_predictions(cells / name / "predictions.parquet"))
        for name in ("raw", "jpeg-20")
    }
    assert not np.allclose(p["raw"], p["jpeg-20"], atol=1e-6)
    # What is evaluated has been through the checkpoint's policy: quality 95 after the degradation.
    shard = ShardSet(cells / "jpeg-20" / "shards", "test")
    found = jpeg_quality(shard.read(0).tobytes())
    assert (
        found is not None
        and found.quality == 95
        and shard.manifest["codec"] == ShardSet(work / "shards", "test").manifest["codec"]
    )
    assert "| jpeg" in text and (tmp_path / "out" / "protocol.md").read_text().startswith("# robustness")


def test_a_result_goes_to_weights_and_biases_where_asked(whole, work, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(work / "staged"))
    for name in ("WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    assert not (whole.output / "wandb.json").exists()
    run([*whole.arguments, "--finish", "--wandb", "offline"])
    wandb.teardown()
    file, merged = read_wandb_file(whole.output), result_of(whole.output)
    assert (file.run.job_type, file.run.run_group) == ("protocol", work.name)
    assert file.run.display_name == f"{work.name} whole"
    assert file.summary["raw/auroc"] == pytest.approx(merged["raw"]["auroc"])
    assert file.summary["jpeg/20.0/drop/auroc"] == pytest.approx(merged["curves"]["jpeg"][1]["drop"]["auroc"])
    columns, rows, _ = file.table("cells")
    assert [row[0] for row in rows] == [cell["name"] for cell in merged["cells"]]
    assert rows[0][columns.index("images")] == merged["cells"][0]["counts"]["images"]


def test_a_finished_protocol_is_merged_again_without_computing(words, whole):
    output = whole.output
    cells = result_of(output)["cells"]
    assert all(cell["counts"]["images"] + cell["counts"]["unreadable"] == 12 for cell in cells)
    assert not list(output.glob("cells/*/shards"))  # not kept unless asked for
    before = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*")}
    bytes_before = (output / "protocol.json").read_bytes()
    (output / "protocol.json").unlink()
    assert run(words(ROBUST, output, "--images", "12")) == whole.text
    assert (output / "protocol.json").read_bytes() == bytes_before
    assert {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*")} == before
    with pytest.raises(UserError, match=r"was begun with images 12, not 8"):
        run(words(ROBUST, output, "--images", "8"))


@pytest.mark.slow
def test_aligned_from_kept_shards_equals_that_from_the_layout(words, work, tmp_path):
    run(words(ALIGNED, tmp_path / "layout"))
    run(words(ALIGNED, tmp_path / "kept", "--shards", str(work / "kept"), source=False))
    ours, theirs = result_of(tmp_path / "layout"), result_of(tmp_path / "kept")
    assert [cell["name"] for cell in ours["cells"]] == ["raw", "jpeg_fakes", "jpeg_all", "history", "size"]
    cells = {cell["name"]: cell for cell in ours["cells"]}
    for name, other in zip(cells, theirs["cells"], strict=True):
        # The kept shards never had the broken image.
        assert other["counts"].pop("unreadable") == 0 and cells[name]["counts"].pop("unreadable") == 1
        assert other["counts"] == cells[name]["counts"]
        assert other["metrics"]["auroc"] == pytest.approx(cells[name]["metrics"]["auroc"], abs=1e-3)
    layout = SyntheticLayout(work / "source", val_fraction=0.1)
    photographs = [r.path for r in layout.records() if r.split == "test" and r.generator == "nature"]
    qualities = [jpeg_quality(layout.read(path)) for path in photographs]
    of_96 = sum(one is not None and one.exact and one.quality == 96 for one in qualities)
    assert 0 < of_96 < len(photographs)
    assert cells["jpeg_fakes"]["counts"]["real"] == of_96
    assert cells["jpeg_fakes"]["left_out"] == {
        "a photograph of another JPEG quality than 96": len(photographs) - of_96
    }
    assert sum(cells["history"]["history"].values()) == len(photographs)
    assert cells["size"]["side"] == 24 and cells["size"]["counts"]["left_out"] == 0
    for name, gap in ours["gaps"].items():
        assert gap["auroc"] == ours["raw"]["auroc"] - cells[name]["metrics"]["auroc"]


def done_by(output):
    """Names of the cells that a process says it did."""
    lines = [line for line in output.splitlines() if line.startswith("[")]
    return [line.split("] ")[1] for line in lines if ":" not in line]


@pytest.mark.slow
def test_tasks_share_the_cells_and_never_do_one_twice(words, whole, start, tmp_path):
    shared = tmp_path / "shared"
    tasks = [start(words(ROBUST, shared, "--images", "12", "--task", n)) for n in ("0/2", "1/2", "0/1")]
    said = [task.communicate(timeout=280)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    names = [name for one in said for name in done_by(one)]
    assert sorted(names) == sorted(cell["name"] for cell in result_of(whole.output)["cells"])
    assert not (shared / "protocol.json").exists()
    run(words(ROBUST, shared, "--images", "12", "--finish"))
    assert (shared / "protocol.json").read_bytes() == (whole.output / "protocol.json").read_bytes()


def test_killed_and_run_again_it_continues(words, whole, start, tmp_path):
    output = tmp_path / "out"
    process = start(words(ROBUST, output, "--images", "12"))
    wait_until(lambda: (output / "cells" / "jpeg-90" / "shards").exists(), 120, "the second cell")
    process.send_signal(signal.SIGKILL)
    process.wait()
    raw = output / "cells" / "raw" / "result.json"
    before = raw.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"^finish: \d of 5 cells of .* are missing: .*chain-2; run"):
        run(words(ROBUST, output, "--images", "12", "--finish"))
    run(words(ROBUST, output, "--images", "12"))
    assert raw.stat().st_mtime_ns == before and not list(output.glob("cells/*/shards"))
    assert (output / "protocol.json").read_bytes() == (whole.output / "protocol.json").read_bytes()


def test_a_failed_cell_is_named_and_the_others_go_on(words, start, tmp_path):
    output = tmp_path / "out"
    text = "protocol: aligned\nviews: [size, jpeg_all]\nsize: 5000\n"
    process = start(words(text, output))
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 2 and "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("error: 1 of 3 cells failed, size first (") and "rejected" in last
    merged = result_of(output)
    assert [cell["name"] for cell in merged["cells"]] == ["raw", "jpeg_all"]
    assert [one["name"] for one in merged["failed"]] == ["size"]
    # A task that has it says so too, and tries again.
    with pytest.raises(UserError, match=r"^task 1/3: 1 of 1 cells failed, size first"):
        run(words(text, output, "--task", "1/3"))


BAD = [
    (ROBUST, ["--checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    (ROBUST, ["--source", "nowhere"], None),
    (ROBUST, ["--split", "tset"], "no images in the tset split"),
    (ROBUST, ["--task", "2/2"], "task 2/2: expected i/n"),
    (ROBUST, ["--task", "0/2", "--finish"], "give one"),
    (ROBUST, ["--finish"], "has no results; run the tasks first"),
]


@pytest.mark.parametrize(("text", "more", "message"), BAD)
def test_mistakes_are_one_line_and_leave_nothing(words, tmp_path, text, more, message):
    if more[0] == "--source":
        (tmp_path / "nothing").mkdir()
        more, message = (
            ["--layout", "genimage", "--source", str(tmp_path / "nothing")],
            "no images of the genimage",
        )
    with pytest.raises(UserError, match=message) as caught:
        run(words(text, tmp_path / "out", *more))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_labels_and_folders_that_do_not_fit_are_one_line(words, work, tmp_path):
    with pytest.raises(UserError, match=r"label space of generators is \[nature, adm\]"):
        run(words(ROBUST, tmp_path / "out", checkpoint="other.pt"))
    with pytest.raises(UserError, match="its codec preset is default"):
        run(words(ROBUST, tmp_path / "out", "--shards", str(work / "shards"), source=False))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="holds other files"):
        run(words(ROBUST, tmp_path / "full"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "protocol.yaml"]


def cross(kind="cross_generator", **changes):
    tiny = dict(
        zip(*[iter(word.removeprefix("--") for word in flags(train__steps=3, **changes))] * 2, strict=True)
    )
    lines = [f"  {key}: '{value}'" for key, value in tiny.items()]
    return "\n".join([f"protocol: {kind}", "config: configs/quickstart.yaml", "flags:", *lines])


@pytest.mark.slow
def test_cross_generator_trains_on_each_and_tests_on_all(words, start, tiny_shards, tmp_path):
    output = tmp_path / "out"
    more = ["--shards", str(tiny_shards), "--generators", "[adm, big_gan]", "--data.sampling=balanced"]
    arguments = words(cross(), output, *more, source=False, checkpoint="")
    arguments = [word for word in arguments if word not in ("--workers", "1")]
    first = start([*arguments, "--task", "1/2"])
    assert first.wait(200) == 0, first.stdout.read()
    log = output / "cells" / "big_gan" / "run" / "metrics.jsonl"
    before = log.stat().st_mtime_ns
    second = start(arguments)
    said = second.communicate(timeout=200)[0]
    assert second.returncode == 0, said
    assert done_by(said) == ["adm"] and log.stat().st_mtime_ns == before
    merged = result_of(output)
    tested = [
        name
        for name, n in ShardSet(tiny_shards, "test").manifest["splits"]["test"]["generators"].items()
        if n
    ]
    assert merged["matrix"]["train"] == ["adm", "big_gan"] and merged["matrix"]["test"] == tested[1:]
    for number, name in enumerate(("adm", "big_gan")):
        metrics = json.loads((output / "cells" / name / "run" / "evaluation" / "metrics.json").read_text())
        expected = [metrics["per_generator"][test]["auroc"] for test in tested[1:]]
        assert merged["matrix"]["auroc"][number] == expected
        config = (output / "cells" / name / "run" / "config.yaml").read_text()
        assert f"generators:\n  - {name}\n" in config and "sampling: balanced" in config


def test_leave_one_out_trains_on_all_the_others(words, work, tiny_shards, tmp_path):
    more = ["--shards", str(tiny_shards)]

    def opened(text, *others):
        arguments = words(text, tmp_path / "out", *more, *others, source=False, checkpoint="")
        return open_protocol(
            parse_command([word for word in arguments if word not in ("--workers", "1")]).config
        )

    cells = opened(cross("leave_one_out")).cells
    names = [
        n for n, c in ShardSet(tiny_shards, "train").manifest["splits"]["train"]["generators"].items() if c
    ][1:]
    assert [cell.name for cell in cells] == [f"without_{name}" for name in names] and len(names) > 2
    for cell, name in zip(cells, names, strict=True):
        assert cell.about == {"train": [other for other in names if other != name], "held_out": name}
    for others, message in (
        (["--generators", "[flux]"], "generators: no generator 'flux' in .*; there are adm"),
        (["--generators", "[nature]"], "no generator 'nature'"),
        (
            ["--generators", "[wukong]", "--shards", str(work / "shards")],
            "wukong has no images in the train split",
        ),
        (["--generators", "[adm]"], "leave_one_out needs two or more"),
        (["--optim.lr", "-1"], r"optim\.lr is -1\.0, expected a number above 0"),
        (["--config", "nowhere.yaml"], r"nowhere\.yaml: no such file"),
        (["--split", "tset"], "no split 'tset'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            opened(cross("leave_one_out"), *others)
        assert "\n" not in str(caught.value)
