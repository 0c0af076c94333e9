"""launch/finetune_mlm.py as a user runs it: every stage, killed, on other numbers of processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.tinyllava.checkpoint import load_tinyllava
from tests.conversations import (
    assert_equal_losses,
    finetuning_flags,
    lines,
    losses,
)
from tests.support import alive, descendants, environment, wait_until
from tests.wandb_file import read_wandb_file

# DeepSpeed compiles its operators at their first use on a machine, which takes minutes.
pytestmark = pytest.mark.timeout(1200)


def interrupted(reference, tmp_path):
    """The reference as if killed behind step 3."""
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    shutil.rmtree(folder / "model")
    return folder


def test_a_run_leaves_what_the_interface_promises(alone):
    folder, output = alone
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model", "exit.json"} <= set(os.listdir(folder))
    assert json.loads((folder / "exit.json").read_text()) == {"code": 0, "message": "finished 6 steps"}
    assert "DeepSpeed ZeRO-2, 1 x cpu, fp32" in output
    assert "at the start" in output
    model, processor = load_tinyllava(folder / "model")
    assert processor.tokenizer(" fake").input_ids
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["lm_head_bias"] is True
    base = load_file(folder / "base" / "model.safetensors")
    assert any(not torch.equal(base[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_names_are_hugging_faces_in_every_stage(alone, second, third):
    for folder, _ in (alone, second, third):
        for place in ("checkpoints/checkpoint-3", "model"):
            names = set(load_file(folder / place / "model.safetensors"))
            assert "model.language_model.layers.0.self_attn.q_proj.weight" in names
            assert "lm_head.bias" in names
            prefixes = (
                "model.language_model.",
                "model.vision_tower.",
                "model.multi_modal_projector.",
                "lm_head.",
            )
            assert [name for name in names if not name.startswith(prefixes)] == []
            assert [name for name in names if "model.model." in name] == []


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_undisturbed(second, torchrun, conversations, tmp_path):
    folder = tmp_path / "run"
    command = torchrun(2, "launch/finetune_mlm.py", *finetuning_flags(conversations, folder))
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(
        lambda: (folder / "checkpoints" / "checkpoint-3" / "complete.json").is_file(), 300, "a checkpoint"
    )
    pids = [process.pid, *descendants(process.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids), 30, "the end of all processes")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6", ignore_errors=True)
    # What a kill in the middle of a save leaves is no checkpoint.
    (folder / "checkpoints" / "checkpoint-5").mkdir(exist_ok=True)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines(folder) == lines(second[0])
    found, expected = (load_file(place / "model" / "model.safetensors") for place in (folder, second[0]))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_two_processes_go_on_as_one(second, third, finetune, tmp_path, stage):
    reference = {2: second, 3: third}[stage][0]
    folder = interrupted(reference, tmp_path)
    finetune(1, stage, folder=folder)
    assert (folder / "checkpoints" / "checkpoint-3" / "latest_universal").is_file()
    assert_equal_losses(losses(folder), losses(reference))


@pytest.mark.slow
def test_one_process_goes_on_as_two(alone, finetune, tmp_path):
    folder = interrupted(alone[0], tmp_path)
    finetune(2, folder=folder)
    assert_equal_losses(losses(folder), losses(alone[0]))


@pytest.mark.long
def test_the_best_checkpoint_by_validation_is_the_model(finetune):
    """With a rate that ruins the model behind step 3, the model is that of step 3."""
    folder, output = finetune(1, 2, "--optim.schedule", "constant", "--optim.lr", "0.5", "--optim.clip", "0")
    checked = {step: loss for kind, step, loss in losses(folder) if kind == "val"}
    best = min(checked, key=lambda step: checked[step])
    assert f"(from checkpoint-{best})" in output
    kept = load_file(folder / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    assert all(
        torch.equal(kept[name], tensor)
        for name, tensor in load_file(folder / "model" / "model.safetensors").items()
    )


@pytest.mark.slow
def test_a_stop_file_saves_and_the_same_command_goes_on(alone, torchrun, conversations, tmp_path):
    folder = tmp_path / "run"
    command = torchrun(1, "launch/finetune_mlm.py", *finetuning_flags(conversations, folder))
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: bool(lines(folder)), 300, "the first step")
    (folder / "stop").touch()
    process.wait(60)
    outcome = json.loads((folder / "exit.json").read_text())
    if outcome["code"] == 75:  # else it was faster than the file
        assert "the same command continues" in outcome["message"]
        assert not (folder / "stop").exists()
        subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=600)
    assert losses(folder)[-1] == losses(alone[0])[-1]


NOTHING = ["--tune.language", "frozen", "--tune.connector", "false", "--tune.vision", "frozen"]
BAD = {
    "missing image": (lambda s: s[1].update(image="gone.png"), [], r"1: .*gone\.png: cannot be read"),
    "marker": (
        lambda s: s[1]["conversations"][1].update(value="Fake.<|endoftext|>"),
        [],
        r"1: holds the template's own marker '<\|endoftext\|>'",
    ),
    "too long": (None, ["--data.max_length", "20"], r"tokens, more than data\.max_length 20"),
    "few": (None, ["--train.global_batch", "64"], r"train\.global_batch is 64, but"),
    "weights": (None, ["--model.weights", "/nowhere"], r"model\.weights /nowhere: no such folder"),
    "fp16": (None, ["--model.precision", "fp16"], r"model\.precision is fp16"),
    "qlora": (None, ["--tune.language", "qlora"], r"tune\.language is qlora"),
    "key": (None, ["--optim.lrr", "1"], r"optim\.lrr"),
    "nothing learns": (None, NOTHING, "nothing would be learned"),
}


@pytest.mark.parametrize(("change", "more", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_leaves_no_model(repo_root, conversations, tmp_path, change, more, said):
    """By plain python, which must work as well."""
    samples = json.loads((conversations / "train.json").read_text())
    for sample in samples:
        if "image" in sample:
            sample["image"] = str(conversations / sample["image"])
    if change is not None:
        change(samples)
    (tmp_path / "train.json").write_text(json.dumps(samples))
    more = ["--data.conversations", str(tmp_path / "train.json"), *more]
    done = subprocess.run(
        [
            sys.executable,
            str(repo_root / "launch/finetune_mlm.py"),
            *finetuning_flags(conversations, tmp_path / "run", 2, *more),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert re.search(said, line), line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "model").exists()
    if (tmp_path / "run").exists():
        assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2


def deepspeed(processes, repo_root, *more):
    """DeepSpeed's own launcher, as installed beside this Python; it counts CPU processes as GPUs."""
    launcher = Path(sys.executable).with_name("deepspeed")
    count = ["--num_gpus", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [str(launcher), *count, str(repo_root / "launch/finetune_mlm.py"), *more],
        env={**environment(), "PATH": f"{launcher.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_deepspeeds_launcher_runs_the_quickstart(repo_root, tmp_path, processes, monkeypatch):
    """`deepspeed launch/finetune_mlm.py` with nothing but other folders, and a sixth of the steps."""
    files = {name: tmp_path / "data" / f"{name}.json" for name in ("conversations", "val", "true_false")}
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    for name in ("WANDB_MODE", "WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    output = deepspeed(
        processes,
        repo_root,
        *("--run.dir", str(tmp_path / "run"), "--train.steps", "20", "--log.wandb", "offline"),
        *("--data.generate.images", "400", "--data.generate.questions", "200"),
        *("--data.generate.val", "20", "--data.generate.benchmark", "12"),
        *("--data.conversations", str(files["conversations"]), "--data.val", str(files["val"])),
        *("--evaluate.benchmarks", json.dumps([str(files["true_false"])])),
    )
    assert f"DeepSpeed ZeRO-2, {processes} x " in output
    first, last = (lines(tmp_path / "run")[place]["loss"] for place in (0, -1))
    assert last < first
    assert "true false: 12 items" in output
    assert "always_fake" in output
    file, answered = read_wandb_file(tmp_path / "run" / "wandb"), read_wandb_file(tmp_path / "run" / "vqa")
    assert (file.run.job_type, answered.run.job_type) == ("finetuning", "benchmark")
    assert file.run.run_group == answered.run.run_group == "run" and file.run.run_id != answered.run.run_id
    losses = {line["step"]: line["loss"] for line in lines(tmp_path / "run") if line["kind"] == "train"}
    assert file.values("train/loss") == pytest.approx(losses)
    assert len(file.config["data_digest"]) == 64 and len(answered.table("answers")[1]) == 12
    assert (tmp_path / "run" / "vqa" / "true_false" / "metrics.json").is_file()


@pytest.mark.slow
def test_the_references_99_samples_and_both_its_benchmarks_end_to_end(finetune, shared_data, tmp_path):
    vqa = shared_data / "vqa"
    benchmarks = []
    for name in ("true_false", "multiple_choice"):
        # Some items of each kind: the whole sets take minutes here, and are run by hand.
        items = json.loads((vqa / name / "questions.json").read_text())[:12]
        for item in items:
            item["image"] = str(vqa / name / "images" / Path(item["image"]).name)
        (tmp_path / f"{name}.json").write_text(json.dumps(items))
        benchmarks.append(str(tmp_path / f"{name}.json"))
    folder, output = finetune(
        1,
        2,
        *("--data.conversations", str(vqa / "finetune")),
        *("--data.val", "", "--data.val_fraction", "0.1", "--evaluate.benchmarks", json.dumps(benchmarks)),
    )
    found = re.search(r"(\d+) conversations, (\d+) for validation", output)
    assert found is not None
    learnt, held = map(int, found.groups())
    assert learnt + held == 99
    assert held > 0
    for name in ("true_false", "multiple_choice"):
        metrics = json.loads((folder / "vqa" / name / "metrics.json").read_text())
        assert metrics["items"] == 12
        assert metrics["kind"] == name
