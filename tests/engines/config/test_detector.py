"""Configurations: precedence, errors in one line, and a frozen list of keys."""

from pathlib import Path

import pytest

from dataio.core.errors import UserError
from engines.config.detector import Config, from_dict, parse_config
from engines.config.mlm import FINETUNE_FREE_KEYS, FinetuneConfig
from engines.config.parser import parse_as
from engines.config.values import FREE_KEYS, changed_keys, flatten, to_dict, to_yaml
from engines.mlm.deepspeed_config import read_deepspeed

CONFIGS = Path(__file__).parents[3] / "configs"
KEYS = Path(__file__).parents[2] / "assets" / "config_keys.txt"
FINETUNE_KEYS = Path(__file__).parents[2] / "assets" / "finetune_keys.txt"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text("optim: {lr: 0.3}\ndata: {size: 64, scale: [0.2, 0.9]}\n")
    return path


def test_the_keys_are_frozen():
    # Adding or removing an option is a decision: change the list in the same commit.
    assert sorted(flatten(to_dict(Config()))) == KEYS.read_text().split()
    assert set(KEYS.read_text().split()) >= FREE_KEYS
    assert sorted(flatten(to_dict(FinetuneConfig()))) == FINETUNE_KEYS.read_text().split()
    assert set(FINETUNE_KEYS.read_text().split()) >= FINETUNE_FREE_KEYS


def test_flags_win_over_the_file_wherever_config_stands(file):
    for argv in (["--optim.lr", "0.5", "--config", str(file)], [f"--config={file}", "--optim.lr=0.5"]):
        config = parse_config(argv, "unused.yaml")
        assert (config.optim.lr, config.data.size, config.data.scale) == (0.5, 64, (0.2, 0.9))


FILES = sorted(
    str(path.relative_to(CONFIGS))
    for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("reference/*.yaml")]
    if "grid" not in path.name
)


@pytest.mark.parametrize("name", FILES)
def test_shipped_configurations_parse_and_survive_a_round_trip(repo_root, name, tmp_path):
    kind: type[Config] | type[FinetuneConfig] = FinetuneConfig if name.startswith("tinyllava") else Config
    config = parse_as(kind, [], repo_root / "configs" / name)
    if isinstance(config, FinetuneConfig):
        assert read_deepspeed(config.deepspeed)
    else:
        assert from_dict(to_dict(config)) == config
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert parse_as(kind, [], tmp_path / "saved.yaml") == config
    assert (repo_root / "configs" / name).read_text().startswith("# ")


def test_launchers_local_rank_is_accepted(file):
    assert parse_config(["--local_rank=1"], file) == parse_config(["--local-rank", "0"], file)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim.l", "0.5"], r"--optim\.l"),
        (["--optim.rate", "0.5"], r"--optim\.rate"),
        (["--optim.lr", "-1"], r"optim\.lr is -1\.0, expected a number above 0"),
        (["--optim.lr", "fast"], r'"optim\.lr".*fast'),
        (["--data.crop", "big"], r"data\.crop"),
        (["--data.pad", "4"], r"data\.pad is 4, expected 0, or more with data\.crop random"),
        (
            ["--train.global_batch", "100"],
            r"train\.global_batch is 100, expected a multiple of train\.micro_batch, 64",
        ),
        (["--config", "nowhere.yaml"], r"nowhere\.yaml: no such file"),
        (["--config"], r"--config: expected a YAML file"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(file, argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config(argv, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["optim: {rate: 1}", "optim: [", "data: {size: 1}", "nothing: 3"])
def test_mistakes_in_a_file_name_the_file(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)) as caught:
        parse_config([], path)
    assert "\n" not in str(caught.value)


def test_only_keys_that_change_the_result_count_as_changed(file):
    stored = to_dict(parse_config([], file))
    assert (
        changed_keys(
            stored, parse_config(["--log.every", "3", "--run.dir", "x", "--checkpoint.keep", "9"], file)
        )
        == []
    )
    assert changed_keys(stored, parse_config(["--optim.lr", "1"], file)) == [("optim.lr", 0.3, 1.0)]


def test_a_key_that_a_newer_version_added_counts_from_its_default(file):
    stored = to_dict(parse_config([], file))
    del stored["optim"]["clip"], stored["model"]["head_hidden"], stored["mix"]
    assert changed_keys(stored, parse_config([], file)) == []
    changes = changed_keys(stored, parse_config(["--optim.clip", "1", "--mix.mixup", "0.5"], file))
    assert sorted(changes) == [("mix.mixup", 0.0, 0.5), ("optim.clip", 0.0, 1.0)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run:\noptim: {lr: 0.1}\n", "run must be a section"),
        ("data: {augment: 3}\n", r"data\.augment must be a section"),
        ("a: &a {b: *a}\n", r"line 1: an alias \(\*a\)"),  # hung the parser
        ("- 1\n", "expected keys and values"),
        ("1: 2\n", "expected keys and values"),
        ("a: [", "cannot be read as YAML"),
        ("train: {graph: on}\n", "train.graph is on without quotes"),
        ("log: {wandb: off}\n", "log.wandb is off without quotes"),
    ],
)
def test_files_of_another_shape_are_named(tmp_path, text, told):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=f"x.yaml: {told}"):
        parse_config([], tmp_path / "x.yaml")


def test_on_and_off_are_read_as_words_in_quotes_and_from_flags(tmp_path):
    (tmp_path / "x.yaml").write_text("train: {graph: 'off', tf32: on}\nlog: {wandb: 'off'}\n")
    config = parse_config(["--train.graph", "on"], tmp_path / "x.yaml")
    assert (config.train.graph, config.train.tf32, config.log.wandb) == ("on", True, "off")


def test_a_key_of_two_types_says_both(file):
    told = r"train\.pass_images.: expected int or one of \['auto'\]\. Got value: foo \(see --help\)$"
    with pytest.raises(UserError, match=told):
        parse_config(["--train.pass_images", "foo"], file)


def test_a_graph_of_a_compiled_model_is_refused_before_a_run(file):
    with pytest.raises(UserError, match=r"train\.graph is on, but train\.compile is set"):
        parse_config(["--train.graph", "on", "--train.compile", "true"], file)
