"""User errors: one line, for Python and for the command line, on this process or another."""

import pickle

import pytest

from dataio.core.errors import UserError, as_user_error, one_line, writing


def test_a_user_error_names_the_argument_or_the_flag():
    error = UserError("expected 1 or more", field="samples_per_shard", value=0)
    assert str(error) == "samples_per_shard 0: expected 1 or more"
    assert error.for_command_line() == "--samples-per-shard 0: expected 1 or more"
    assert str(UserError("no such file", field="config")) == "config: no such file"
    assert UserError("x.csv: empty").for_command_line() == "x.csv: empty"


def test_a_user_error_is_one_line_and_survives_another_process():
    error = pickle.loads(pickle.dumps(UserError("a\nb\rc", field="output", value="d")))
    assert str(error) == "output d: a\\nb\\rc" and error.field == "output"


def test_a_failed_write_names_path_reason_and_remedy(tmp_path):
    with (
        pytest.raises(UserError, match=r"gone/x: cannot be written \(No such file or directory\); mount it$"),
        writing(tmp_path / "gone/x", hint="mount it"),
    ):
        (tmp_path / "gone/x").write_text("")
    with pytest.raises(UserError, match=r"^output .*: cannot be written"), writing(tmp_path, field="output"):
        tmp_path.write_text("")


def test_a_value_error_of_a_lower_layer_becomes_a_user_error():
    with (
        pytest.raises(UserError, match=r"^model\.weights of another shape$"),
        as_user_error("model.weights "),
    ):
        raise ValueError("of another\n   shape")
    with pytest.raises(TypeError), as_user_error():
        raise TypeError("a programming error stays one")
    assert one_line("a \n b") == "a b"
