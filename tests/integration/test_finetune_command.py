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

from engines.mlm.trainer import load_unfrozen
from models.tinyllava.checkpoint import load_tinyllava
from models.tinyllava.model import without_zero3_init
from tests.conversations import LORA, PARTIAL, finetuning_flags, write_conversations
from tests.support import alive, descendants, environment, wait_until

# DeepSpeed compiles its operators at their first use on a machine, which takes minutes.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    write_conversations(folder)
    return folder


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


@pytest.fixture(scope="module")
def finetune(torchrun, conversations, tmp_path_factory):
    """Run the command to its end; gives the run's folder and what it printed."""

    def call(processes, stage=2, *more, folder=None):
        folder = folder or tmp_path_factory.mktemp("finetuned") / "run"
        command = torchrun(
            processes, "launch/finetune_mlm.py", *finetuning_flags(conversations, folder, stage, *more)
        )
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        return folder, done.stdout + done.stderr

    return call


@pytest.fixture(scope="module")
def alone(finetune):
    return finetune(1)


@pytest.fixture(scope="module")
def second(finetune):
    return finetune(2, 2)


@pytest.fixture(scope="module")
def third(finetune):
    return finetune(2, 3)


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
def test_two_processes_under_zero_2_and_3_train_as_one_does(alone, second, third):
    expected = losses(alone[0])
    assert len(expected) == 8
    assert_equal_losses(losses(second[0]), expected)
    assert_equal_losses(losses(third[0]), expected)
    assert "DeepSpeed ZeRO-3, 2 x cpu" in third[1]
    before, after = (load_file(run[0] / "model" / "model.safetensors") for run in (alone, third))
    assert before.keys() == after.keys()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-3


@pytest.mark.slow
def test_zero_1_trains_as_one_process_does(alone, finetune):
    assert_equal_losses(losses(finetune(2, 1)[0]), losses(alone[0]))


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
@pytest.mark.parametrize("stage", [2, 3])
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


def check_adapter(folder):
    """RUN/model is the base with what learnt beside the adapter, and the adapter merged."""
    from peft import PeftModel

    with without_zero3_init():
        base, _ = load_tinyllava(folder / "base")
        load_unfrozen(base, folder / "adapter")
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    saved = load_file(folder / "model" / "model.safetensors")
    assert merged.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(saved[name], merged[name])] == []
    start = load_file(folder / "base" / "model.safetensors")
    changed = {name for name in saved if not torch.equal(saved[name], start[name])}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.multi_modal_projector.linear_1.weight" in changed
    assert "model.vision_tower.encoder.layers.1.mlp.fc1.weight" in changed
    assert not any("encoder.layers.0." in name or "lm_head" in name for name in changed)


@pytest.mark.slow
def test_adapters_under_zero_3_save_merge_and_reload(finetune):
    folder, output = finetune(2, 3, *LORA, *PARTIAL, "--train.gradient_checkpointing", "true")
    check_adapter(folder)
    assert "language lora, connector full, vision partial" in output


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_train_alike_in_stages_2_and_3(finetune, precision):
    found = [
        finetune(n, stage, *LORA, *PARTIAL, "--model.precision", precision)[0]
        for n, stage in ((1, 2), (2, 2), (2, 3))
    ]
    for folder in found[1:]:
        assert_equal_losses(losses(folder), losses(found[0]), 1e-5 if precision == "fp32" else 3e-2)
    if precision == "fp32":
        check_adapter(found[1])


@pytest.mark.slow
def test_dora_and_an_offloaded_optimiser(alone, finetune):
    dora, _ = finetune(2, 3, *LORA, *PARTIAL, "--tune.language", "dora")
    assert losses(dora)[-1][2] < losses(dora)[0][2]
    for file in ("zero2_offload", "zero3_offload"):
        folder, _ = finetune(2, 2, "--deepspeed", f"configs/deepspeed/{file}.json")
        # DeepSpeed's own AdamW on the host rounds differently.
        assert_equal_losses(losses(folder), losses(alone[0]), 1e-3)


@pytest.mark.slow
def test_the_references_averaging_weighs_batches_alike(alone, finetune):
    words = ("--train.loss", "batches", "--train.micro_batch", "3")  # micro-batches of 3, 3 and 2
    by_batch = losses(finetune(1, 2, *words)[0])
    assert by_batch[0][2] != losses(alone[0])[0][2]
    # One of the two processes has one micro-batch less than the other.
    assert_equal_losses(losses(finetune(2, 2, *words)[0]), by_batch)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(alone, finetune):
    whole, output = finetune(1, 2, "--train.micro_batch", "8", "--train.steps", "1")
    first, expected = lines(alone[0])[0], lines(whole)[0]
    assert first["step"] == expected["step"] == 1
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert "accumulation" not in output + alone[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_three_processes_train_as_one_does(alone, finetune, stage):
    """8 conversations are 2, 3 and 3: two passes each, of at most 2."""
    folder, output = finetune(3, stage, "--train.micro_batch", "2")
    assert f"DeepSpeed ZeRO-{stage}, 3 x cpu" in output
    assert_equal_losses(losses(folder), losses(alone[0]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_more_processes_than_conversations_of_a_step(finetune, stage):
    words = ("--train.global_batch", "2", "--train.steps", "3")
    assert_equal_losses(losses(finetune(3, stage, *words)[0]), losses(finetune(1, stage, *words)[0]))


@pytest.mark.slow
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
def test_deepspeeds_launcher_runs_the_quickstart(repo_root, tmp_path, processes):
    """`deepspeed launch/finetune_mlm.py` with nothing but other folders, and a sixth of the steps."""
    files = {name: tmp_path / "data" / f"{name}.json" for name in ("conversations", "val", "true_false")}
    output = deepspeed(
        processes,
        repo_root,
        *("--run.dir", str(tmp_path / "run"), "--train.steps", "20", "--log.wandb", "off"),
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
