"""Killed anywhere and run again: the same bits, the same samples, the same log.

A chain of faults strikes one run, a new one after each restart, and the end is compared once:
whatever one of them had spoilt would still be seen.
"""

import pytest

from tests.integration.faults.harness import STEPS, Run, differing, ended_well

# Checkpoints after steps 3, 6, 9 and 10, of which two are kept; validation after 7 (the epoch's end) and 10.
CORE = (
    "kill@checkpoint.write:step=3,rank=0",
    "kill_all@checkpoint.fsynced:step=3,rank=0",
    "kill_all@checkpoint.renamed:step=3,rank=0",
    "kill@data.next:step=4,rank=1",
    "kill_all@validation.batch:step=7,rank=1",
    "kill_all@checkpoint.delete:step=9,rank=0",
)
REST = (
    "kill@step.begin:step=0,rank=1",
    "kill@checkpoint.begin:step=3,rank=0",
    "kill@checkpoint.written:step=3,rank=0",
    "raise@checkpoint.written:step=3,rank=0",
    "kill@checkpoint.fsynced:step=6,rank=0",
    "kill@epoch.end:step=7,rank=1",
    "kill_all@best.write:step=7,rank=0",
    "kill@validation.end:step=7,rank=0",
    "kill@checkpoint.renamed:step=9,rank=0",
    "kill_all@step.begin:step=9,rank=1",
    "kill_all@validation.end:step=10,rank=1",
    "kill_all@checkpoint.write:step=10,rank=0",
    "kill_all@export:step=10,rank=0",
)


def chain(faults):
    """Each strikes in its own restart."""
    return "; ".join(f"{fault},restart={number}" for number, fault in enumerate(faults))


def struck(done):
    return [line for line in done.stderr.splitlines() if line.startswith("fault: ")]


def test_killed_at_each_stage_torchrun_restarts_it_to_the_same_bits(undisturbed, disturbed):
    run: Run = disturbed()
    done = run.go(2, chain(CORE), restarts=len(CORE))
    ended_well(done)
    assert len(struck(done)) == len(CORE)
    assert "continuing after step 9" in done.stdout and "continuing after step 3" in done.stdout
    assert differing(run, undisturbed(2)) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)  # each restart imports PyTorch in every process
@pytest.mark.parametrize(
    ("processes", "faults"),
    [
        pytest.param(2, REST, id="2-rest"),
        pytest.param(4, CORE, id="4-core", marks=pytest.mark.long),
        pytest.param(4, REST[:7], id="4-rest", marks=pytest.mark.long),
        pytest.param(4, REST[7:], id="4-end", marks=pytest.mark.long),
    ],
)
def test_the_rest_of_the_matrix(undisturbed, disturbed, processes, faults):
    run: Run = disturbed()
    done = run.go(processes, chain(faults), restarts=len(faults), timeout=1100)
    ended_well(done)
    assert len(struck(done)) == len(faults)
    assert differing(run, undisturbed(processes)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        ("kill_launcher@data.next:step=5,rank=1", "kill_launcher@checkpoint.write:step=6,rank=0"),
        ("kill@checkpoint.fsynced:step=6,rank=0", "kill_all@validation.batch:step=7,rank=0"),
        ("hang@checkpoint.write:step=9,rank=0",),
    ],
    ids=["launcher", "ranks", "writer"],
)
def test_the_same_command_again_gives_the_same_bits(undisturbed, disturbed, faults):
    run: Run = disturbed(train__timeout=0.1)
    for fault in faults:
        assert run.go(2, fault).returncode != 0
        assert not (run.folder / "final.safetensors").exists()
    ended_well(run.go(2))
    assert differing(run, undisturbed(2)) == []


@pytest.mark.slow
def test_written_by_the_training_itself_the_bits_are_the_same(undisturbed, disturbed):
    faults = ("kill_all@checkpoint.write:step=6,rank=0", "kill_all@checkpoint.renamed:step=6,rank=0")
    run: Run = disturbed(checkpoint__background="false")
    ended_well(run.go(2, chain(faults), restarts=len(faults)))
    assert differing(run, undisturbed(2)) == []
    one, other = (r.folder / "checkpoints" / f"step_{STEPS:08d}.pt" for r in (run, undisturbed(2)))
    assert one.stat().st_size == pytest.approx(other.stat().st_size, abs=1024)
