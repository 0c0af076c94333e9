"""Which validation is the best, and that a continuation counts on."""

from dataclasses import replace

import pytest

from engines.config.detector import CheckpointConfig, Config, OptimConfig, TrainConfig
from engines.train.selection import ModelSelection


@pytest.fixture
def make():
    def build(**changes):
        config = replace(
            Config(),
            optim=OptimConfig(schedule="plateau", plateau_patience=1),
            train=TrainConfig(early_stop=3),
            checkpoint=CheckpointConfig(best="joint_error"),
        )
        return ModelSelection(replace(config, **changes), steps_per_epoch=10)

    return build


@pytest.mark.parametrize(
    ("metrics", "score"),
    [
        ({"joint_error": 0.0, "loss": 2.0}, 0.0),
        ({"joint_error": None, "loss": 2.0}, 2.0),
        ({"joint_error": None, "loss": 0.0}, 0.0),
        ({}, -7.0),
    ],
)
def test_the_score_is_the_metric_else_the_loss_else_the_step(make, metrics, score):
    assert make().score_of(metrics, step=7) == score


def test_best_is_the_lowest_and_the_first_of_equals(make):
    selection = make()
    updates = [selection.update(score, step).is_best for step, score in enumerate([0.5, 0.5, 0.4, 0.6])]
    assert updates == [True, False, True, False]
    assert selection.best == {"score": 0.4, "step": 2, "metric": "joint_error"}


def test_a_loaded_state_goes_on_as_the_one_it_was_taken_from(make):
    scores = [0.5, 0.6, 0.6, 0.4, 0.6, 0.6, 0.6]
    for at in range(len(scores)):
        selection, resumed = make(), make()
        for step in range(at):
            selection.update(scores[step], step)
        resumed.load_state(selection.state())
        assert resumed.state() == selection.state()
        for step in range(at, len(scores)):
            assert resumed.update(scores[step], step) == selection.update(scores[step], step)
        assert resumed.state() == selection.state() and selection.early_stopped
        assert (selection.cuts, selection.best["score"]) == (2, 0.4)


def test_the_first_checkpoints_have_the_best_only(make):
    selection = make()
    best = {"score": 0.3, "step": 4, "metric": "joint_error"}
    selection.load_state({"best": best, "step": 5})
    assert selection.state() == {**make().state(), "best": best}
