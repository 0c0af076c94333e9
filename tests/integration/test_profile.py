"""train.profile: a trace of chosen steps in every process, which changes no bit of the run."""

import gzip
import json

import pytest

from dataio.core.errors import UserError
from engines.config.detector import parse_config, parse_range
from tests.support import flags

RANGES = {"read", "decode", "augment", "forward", "backward", "all-reduce", "optimizer"}


@pytest.fixture(scope="module")
def words(tiny_shards):
    def make(folder, *more):
        return [*flags(data__shards=tiny_shards, train__steps=4), "--run.dir", str(folder), *more]

    return make


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "perf"} for line in lines]


def inside(one, other):
    return other["ts"] <= one["ts"] <= other["ts"] + other["dur"]


@pytest.mark.slow
def test_each_rank_writes_its_ranges_and_the_run_is_the_same_bit_for_bit(run, torchrun, words, tmp_path):
    traced, plain = tmp_path / "traced", tmp_path / "plain"
    done = run(torchrun(2, "launch/train.py", *words(traced, "--train.profile", "1:3")))
    assert done.returncode == 0, done.stderr
    assert f"trace of steps 1:3: {traced}/profile/rank0.json.gz" in done.stdout
    assert sorted(path.name for path in (traced / "profile").iterdir()) == ["rank0.json.gz", "rank1.json.gz"]
    for rank in range(2):
        with gzip.open(traced / "profile" / f"rank{rank}.json.gz", "rt") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("name") in RANGES]
        names = [event["name"] for event in events]
        assert set(names) == RANGES
        # Two steps of two micro-batches on this rank; one update each.
        assert (names.count("forward"), names.count("optimizer")) == (4, 2)
        reduces = [event for event in events if event["name"] == "all-reduce"]
        backward = [event for event in events if event["name"] == "backward"]
        assert any(inside(one, other) for one in reduces for other in backward)
        assert {one["args"]["backend"] for one in reduces} == {"gloo:all_reduce"}
    assert run(torchrun(2, "launch/train.py", *words(plain))).returncode == 0
    assert not (plain / "profile").exists()
    assert records(plain) == records(traced) and len(records(plain)) >= 4


@pytest.mark.parametrize("text", ["20", "5:5", "6:5", "-1:3", "a:b", "1:2:3"])
def test_a_range_that_is_none_is_named(text, repo_root):
    with pytest.raises(UserError, match=rf"train\.profile is '{text}', expected START:STOP") as error:
        parse_config([f"--train.profile={text}"], repo_root / "configs" / "quickstart.yaml")
    assert len(str(error.value).splitlines()) == 1


def test_ranges_leave_out_their_stop():
    assert list(parse_range("2:5")) == [2, 3, 4] and list(parse_range("")) == []


def test_steps_that_the_run_has_not_stop_it_before_it_starts(run, torchrun, words, tmp_path):
    done = run(torchrun(1, "launch/train.py", *words(tmp_path / "run", "--train.profile", "2:9")))
    assert done.returncode != 0
    assert "error: train.profile is 2:9, but the run has 4 steps" in done.stdout + done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
