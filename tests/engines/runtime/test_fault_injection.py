"""Faults are asked for in one variable, and a mistake in it is said."""

import ast
import inspect

import pytest

from dataio.core.errors import UserError
from engines.runtime import fault_injection as faults
from engines.runtime.fault_injection import Fault, parse_faults


def test_several_with_conditions():
    assert parse_faults("kill@checkpoint.fsynced:step=6,rank=0; nan@step.forward") == [
        Fault("kill", "checkpoint.fsynced", {"step": 6, "rank": 0}),
        Fault("nan", "step.forward", {}),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "kill",
        "kill@nowhere",
        "melt@data.next",
        "nan@data.next",
        "kill@data.next:step=x",
        "kill@data.next:a=1",
    ],
)
def test_mistakes_are_said(text):
    with pytest.raises(UserError, match=r"^TELLTALE_FAULT: "):
        parse_faults(text)


def test_all_conditions_must_hold(monkeypatch):
    fault = Fault("raise", "data.next", {"step": 3, "rank": 1, "restart": 2})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert fault.strikes("data.next", 3)
    assert not fault.strikes("data.next", 4) and not fault.strikes("step.begin", 3)
    monkeypatch.setenv("RANK", "0")
    assert not fault.strikes("data.next", 3)


def test_every_point_is_in_the_code_once(repo_root):
    names = (
        "train/trainer.py",
        "train/loop.py",
        "checkpoint/async_saver.py",
        "checkpoint/files.py",
        "runtime/run_log.py",
    )
    texts = "".join((repo_root / "engines" / name).read_text() for name in names)
    staged = {f"checkpoint.{stage}" for stage in ("written", "fsynced", "renamed")}
    for point in faults.POINTS:
        if point in staged:  # named by what dataio.core.atomic says
            assert (
                f'"{point.removeprefix("checkpoint.")}"' in (repo_root / "dataio/core/atomic.py").read_text()
            )
        elif point != "step.forward":
            assert texts.count(f'"{point}"') == 1, point


def test_without_the_variable_a_point_is_one_comparison():
    assert faults._faults is None
    body = ast.parse(inspect.getsource(faults.inject)).body[0]
    assert isinstance(body, ast.FunctionDef)
    # Behind the docstring there is only the question whether there are faults at all.
    assert [type(statement) for statement in body.body[1:]] == [ast.If]
