"""Whole scripts in a copy of the repository: the user's first command, and the pipeline to the report."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from dataio.layouts.synthetic import write_synthetic
from tests.cluster.client import Cluster
from tests.runs import lines, outcome
from tests.support import flags

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

QUESTIONS = ["--train", "40", "--val", "8", "--true-false", "20", "--multiple-choice", "20"]
FOLDERS = ("configs", "dataio", "engines", "launch", "models", "slurm")


@pytest.fixture
def repository(repo_root: Path, tmp_path: Path) -> Path:
    """A fresh copy: relative paths of configurations and scripts are below the repository."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "site.env")
        shutil.copytree(repo_root / name, tmp_path / "telltale" / name, ignore=ignored)
    return tmp_path / "telltale"


def test_the_first_command_trains_the_quickstart(slurm: Cluster, repository: Path) -> None:
    job = slurm.sbatch("slurm/train_resnet50.sh", cwd=repository)
    assert slurm.wait(job, seconds=1500) == "COMPLETED", slurm.log(job)
    log = slurm.log(job)
    assert "no --config given: configs/quickstart.yaml" in log
    run = repository / "runs/quickstart"
    assert outcome(run)["code"] == 0
    assert torch.load(run / "best.pt", weights_only=True)["step"] > 0
    # What the configuration promises of its validation is what was trained.
    errors = [line["generator_error"] for line in lines(run) if line["kind"] == "val"]
    assert min(errors) < 0.2 < errors[0]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small raw data set, laid out as GenImage is."""
    write_synthetic(tmp_path / "source", images=300, size=48, seed=7)
    return tmp_path / "source"


def pipeline(
    slurm: Cluster, repository: Path, source: Path, *words: str, env: dict[str, str] | None = None
) -> str:
    """Submit the pipeline for `source`; returns what it printed."""
    shard = ["--source", source, "--samples-per-shard", "100", "--codec.size", "32", "--val-fraction", "0.3"]
    return slurm.run(
        "bash",
        "slurm/pipeline.sh",
        "--name",
        "small",
        "--tasks",
        "2",
        "--layout",
        "genimage",
        *shard,
        *words,
        cwd=repository,
        env=env,
    )


def stages(printed: str) -> dict[str, str]:
    """Job ids by stage, and the job that says how all ended, as the pipeline printed them."""
    found = dict(re.findall(r"^(\w+) +(\d+)$", printed, re.MULTILINE))
    [found["status"]] = re.findall(r"says how all ended \(job (\d+)\)", printed)
    return found


def test_pipeline_goes_from_images_to_the_report(slurm: Cluster, repository: Path, source: Path) -> None:
    tune = [
        "--train.steps",
        "2",
        "--train.global_batch",
        "8",
        "--train.micro_batch",
        "8",
        "--log.wandb",
        "off",
    ]
    printed = pipeline(
        slurm,
        repository,
        source,
        "--for-train",
        *flags(),
        "--for-finetune",
        *tune,
        "--for-questions",
        *QUESTIONS,
    )
    jobs = stages(printed)
    assert list(jobs) == [
        "shard",
        "audit",
        "train",
        "calibrate",
        "evaluate",
        "questions",
        "finetune",
        "report",
        "status",
    ]
    slurm.until(
        lambda: (repository / "runs/small/slurm/status.txt").exists(),
        "the pipeline's end",
        jobs["report"],
        1500,
    )
    assert slurm.wait(jobs["status"]) == "COMPLETED", slurm.log(jobs["status"])
    status = slurm.log(jobs["status"]).splitlines()
    assert [line.split()[0] for line in status if line.endswith(" done")] == list(jobs)[:-1], status
    page = (repository / "runs/small/evaluation/report.html").read_text()
    # The benchmarks come from the explainer, so the last stage had all before it.
    assert 'id="explainer"' in page and "multiple choice" in page


def test_pipeline_whose_explainer_fails_has_its_report(
    slurm: Cluster, repository: Path, source: Path
) -> None:
    words = ["--for-train", *flags(train__epochs=1), "--for-finetune", "--optim.rate", "1"]
    jobs = stages(pipeline(slurm, repository, source, *words, "--for-questions", *QUESTIONS))
    slurm.until(
        lambda: (repository / "runs/small/slurm/status.txt").exists(), "the end", jobs["report"], 1500
    )
    assert slurm.wait(jobs["status"]) == "FAILED"
    states = {stage: slurm.job(jobs[stage])["JobState"] for stage in ("evaluate", "finetune", "report")}
    assert states == {"evaluate": "COMPLETED", "finetune": "FAILED", "report": "COMPLETED"}
    assert "small-explainer has answered no benchmark" in slurm.log(jobs["report"])
    assert (repository / "runs/small/evaluation/report.html").is_file()
    assert "failed: finetune; its log is " in slurm.log(jobs["status"])


def test_pipeline_without_the_explainer_s_weights_submits_nothing(
    slurm: Cluster, repository: Path, source: Path
) -> None:
    words = ["bash", "slurm/pipeline.sh", "--layout", "genimage", "--source", source]
    done = slurm.call(*words, cwd=repository, env={"TELLTALE_NEED_GPU": "1"})
    assert done.returncode == 2 and not slurm.run("squeue", "-h", "--me")
    assert done.stderr.startswith("error: weights/TinyLLaVA-Phi-2-SigLIP-3.1B: no such folder"), done.stderr
    assert "--no-finetune" in done.stderr and len(done.stderr.splitlines()) == 1


def test_pipeline_of_which_slurm_refuses_a_stage_queues_nothing(
    slurm: Cluster, repository: Path, source: Path
) -> None:
    words = ["bash", "slurm/pipeline.sh", "--layout", "genimage", "--source", source, "--nodes", "9"]
    done = slurm.call(*words, cwd=repository)
    assert done.returncode == 2
    assert done.stderr.endswith("error: sbatch refused the stage train; nothing is queued\n"), done.stderr
    slurm.until(lambda: not slurm.run("squeue", "-h", "--me"), "an empty queue")


def test_pipeline_whose_stage_fails_stops_and_says_which(
    slurm: Cluster, repository: Path, source: Path
) -> None:
    elsewhere = {"TELLTALE_RUNS": str(source.parent / "r"), "TELLTALE_DATA": str(source.parent / "d")}
    jobs = stages(
        pipeline(
            slurm,
            repository,
            source,
            *("--for-train", "--optim.rate", "1"),
            env={**elsewhere, "TELLTALE_CPU_PARTITION": "urgent"},
        )
    )
    slurm.wait(jobs["status"], seconds=600)
    places = {stage: slurm.job(job)["Partition"] for stage, job in jobs.items()}
    assert {stage for stage, place in places.items() if place == "urgent"} == {
        *("shard", "audit", "questions", "report")
    }
    # What computes on a GPU takes the whole node, and the rest does not.
    assert (
        slurm.job(jobs["audit"])["OverSubscribe"] == "OK"
        and slurm.job(jobs["train"])["OverSubscribe"] == "NO"
    )
    assert not (repository / "runs").exists() and not (repository / "data").exists()
    states = {stage: slurm.job(job)["JobState"] for stage, job in jobs.items() if stage != "shard"}
    behind = list(jobs)[list(jobs).index("train") + 1 : -1]
    assert len(behind) == 5
    assert states == {
        "audit": "COMPLETED",
        "train": "FAILED",
        **dict.fromkeys(behind, "CANCELLED"),
        "status": "FAILED",
    }
    said = slurm.log(jobs["status"])
    assert "failed: train; its log is " in said and "optim.rate" in said.splitlines()[-1], said
    assert said.count("not run, since train failed") == 5
    log = re.findall(r"its log is (\S+)", said)[0]
    assert "optim.rate" in (repository / log).read_text()
