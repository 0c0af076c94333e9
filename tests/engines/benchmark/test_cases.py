"""What the benchmark's cases of training, saving and finetuning compute; never how fast anything is."""

import json
import re
import subprocess
import sys

import pytest
import torch

from engines.benchmark import goals as benchmark_goals
from engines.benchmark import memory as benchmark_memory
from engines.benchmark import roofline
from engines.benchmark.case import BenchmarkSettings, Result
from engines.benchmark.cases_mlm import _Counting, write_conversations
from engines.benchmark.document import document, results_table
from engines.benchmark.registry import GROUPS
from engines.mlm.dataset import Collator
from models.detector.config import ModelConfig
from models.detector.dual_head import DualHead
from models.detector.flops import training_flops

# ---- roofline ---------------------------------------------------------------------------------


def test_the_bound_is_memory_below_the_ridge_and_arithmetic_above():
    limits = roofline.Limits(bandwidth=10.0, flops=40.0)
    assert [limits.bound(intensity) for intensity in (1, 4, 100)] == [10, 40, 40]


def test_memory_and_arithmetic_are_measured():
    cpu = torch.device("cpu")
    # No machine copies slower than a hundredth of, or faster than a hundred times, what they do today.
    assert 1e8 < roofline.memory_bandwidth(cpu, mib=8) < 1e13
    assert 1e8 < roofline.matmul_flops(cpu, "fp32", side=256) < 1e14
    assert 1e8 < roofline.convolution_flops(cpu, "fp32", images=1) < 1e14


def test_traffic_of_resnet50_is_what_its_layers_move():
    model = DualHead(ModelConfig(backbone="resnet50"), ["nature", "adm"], ["thing"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    few, many = (roofline.step_traffic(model, batch, 224, "bf16") for batch in (32, 64))
    # 11.11 million activations leave its convolutions, in 2 bytes; by hand, with 8 passes of batch norm,
    # 6 of convolutions and 5 of ReLU over them, it is about 0.46 GB an image.
    assert (many - few) / 32 == pytest.approx(0.46e9, rel=0.05)
    assert training_flops(model, 224) / 1e9 == pytest.approx(24.3, rel=0.01)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert roofline.step_traffic(model, 32, 224, "fp32") == pytest.approx(2 * few, rel=0.02)


def result(group, case, median=1.0, **extra):
    return Result(group, case, "images", median, [median], 0.0, 0.0, 1.0, extra)


def test_the_machines_limits_are_in_the_document():
    settings = BenchmarkSettings(folder="nowhere", limits=roofline.Limits(2.5e10, 8e10))
    facts = {"cores": 2, "processor": "", "memory_gib": 1, "gpu": None, "gpus": 0, "load_before": 0}
    written = json.loads(json.dumps(document([result("a", "b")], [], settings, facts)))
    assert (written["machine"]["bandwidth_gb_s"], written["machine"]["peak_tflops"]) == (25.0, 0.08)
    assert "limits" not in written["settings"]
    assert "| a | b |" in re.sub(" +", " ", results_table(written))


# ---- finetuning -------------------------------------------------------------------------------


def test_conversations_are_uneven_and_the_same_each_time(tmp_path):
    (tmp_path / "again").mkdir()
    first, again = (
        json.loads(write_conversations(folder, [tmp_path / "a.jpg"]).read_text())
        for folder in (tmp_path, tmp_path / "again")
    )
    assert first == again and len(first) == 256
    lengths = [len(record["conversations"][1]["value"].split()) for record in first]
    assert min(lengths) < 10 and max(lengths) > 200


def test_batches_are_counted_without_their_padding():
    items = [
        {"input_ids": torch.ones(length, dtype=torch.int64), "labels": torch.ones(length, dtype=torch.int64)}
        for length in (3, 5)
    ]
    counting = _Counting(Collator(0, 8))
    batch = counting([{**item, "pixel_values": None} for item in items])
    assert batch["input_ids"].shape == (2, 5)
    assert list(counting.made) == [(2, 8, 10)]


# ---- goals ------------------------------------------------------------------------------------

FOUND = [
    result("train", "telltale", 6000.0, data_wait_share=0.005),
    result("load", "telltale", 9000.0),
    result("checkpoint", "telltale (in the background)", stall_ms=40.0),
]


def test_goals_are_judged_by_their_floors():
    rows = {row["name"]: row for row in benchmark_goals.compare_with_goals(FOUND, gpu=True)}
    met = [row["met"] for row in rows.values()]
    assert met == ["floor", "no", "goal", "goal", "not measured"]
    assert rows["share of training that waits for data"]["measured"] == pytest.approx(0.5)
    on_cpu = benchmark_goals.compare_with_goals(FOUND, gpu=False)
    assert [row["met"] for row in on_cpu] == ["not a GPU"] * 4 + ["not measured"]
    text = re.sub(" +", " ", benchmark_goals.goals_table(list(rows.values())))
    assert (
        "| ResNet-50, 224 px, end to end from tars | 5,000 img/s | 7,950 img/s | 6,000 img/s | floor |"
        in text
    )
    json.dumps(list(rows.values()), allow_nan=False)


def test_finetuning_is_compared_in_tokens():
    pair = [
        result("finetune", case, tokens_per_second=t)
        for case, t in zip(benchmark_goals.CASES["finetune"], (300.0, 200.0), strict=True)
    ]
    assert benchmark_goals.compare_with_goals(pair, gpu=True)[-1]["measured"] == 1.5


def test_the_goals_cases_are_there():
    for group, cases in benchmark_goals.CASES.items():
        assert set(cases) <= set(GROUPS[group].cases)


def test_time_to_an_error_counts_training_and_validation():
    def line(kind, seconds, error=None):
        return {"kind": kind, "real_fake_error": error, "perf": {"seconds": seconds}}

    lines = [line("train", 2.0, 0.01), line("val", 0.5, 0.2), line("train", 2.0), line("val", 0.5, 0.03)]
    assert benchmark_goals.time_to_error(lines, 0.0306) == 5.0
    assert benchmark_goals.time_to_error(lines[:3], 0.0306) is None


# ---- memory -----------------------------------------------------------------------------------


def test_memory_is_that_of_the_largest_process_while_it_runs():
    # In a grandchild: 100 MiB that the first process never had.
    inner = "import time; held = b'x' * (100 << 20); time.sleep(1)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen([sys.executable, "-c", script])
    assert 100 < benchmark_memory.peak_mib(process.pid, lambda: process.poll() is None) < 200


def test_the_table_says_what_a_file_more_costs():
    rows = [{"files": 1000, "plan_mib": 50.0}, {"files": 3000, "plan_mib": 52.0}]
    assert (
        re.sub(" +", " ", benchmark_memory.peak_memory_table(rows)).splitlines()[-1]
        == "| each file more | 1,049 bytes |"
    )
