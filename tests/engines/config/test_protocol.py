"""Protocols' files and flags: what is shipped parses, and every mistake is one line."""

import pytest

from dataio.core.errors import UserError
from engines.config.detector import parse_config
from engines.config.protocol import FOREIGN, parse_command, split_training_flags, to_plain

VIEWED = ["--checkpoint", "best.pt", "--layout", "genimage", "--source", "GenImage"]
ROBUST = "protocol: robustness\noperations: {jpeg: [95, 30], blur: [1.5]}\nchains: [1, 5]\n"
CROSS = "protocol: cross_generator\nshards: data\nconfig: c.yaml\nflags: {log.wandb: 'off', optim.lr: 0.5}\n"


@pytest.fixture
def parse(tmp_path):
    def call(text, *words):
        path = tmp_path / "protocol.yaml"
        path.write_text(text)
        return parse_command([str(path), "--output", "out", *words]).config

    return call


@pytest.mark.parametrize("name", ["robustness", "aligned", "cross_generator", "leave_one_out"])
def test_shipped_protocols_parse_and_their_trainings_too(repo_root, name):
    path = repo_root / "configs" / "protocols" / f"{name}.yaml"
    assert path.read_text().startswith("# ")
    viewed = name in ("robustness", "aligned")
    config = parse_command([str(path), "--output", "out", *(VIEWED if viewed else [])]).config
    assert config.protocol == name
    if not viewed:
        parse_config([f"--{key}={value}" for key, value in config.flags.items()], repo_root / config.config)
    if name == "robustness":
        count = 1 + len(config.all_operations()) + len(config.chains)
        assert f"{count} cells" in path.read_text()  # as its comment has it
        assert config.genimage and config.chains == [1, 2, 3, 4, 5]


def test_there_is_no_other_file(repo_root):
    assert len(list((repo_root / "configs" / "protocols").iterdir())) == 4


def test_flags_win_and_take_either_spelling(parse):
    config = parse(ROBUST, *VIEWED, "--val-labels", "v.csv", "--images=7", "--operations", "{webp: [80]}")
    assert (config.val_labels, config.images, config.operations) == ("v.csv", 7, {"webp": [80.0]})
    assert list(config.all_operations()) == ["webp-80"] and config.chains == [1, 5]
    assert list(parse(ROBUST, *VIEWED).all_operations()) == ["jpeg-95", "jpeg-30", "blur-1.5"]


def test_dotted_flags_are_the_trainings_and_words_stay_words(parse):
    config = parse(CROSS, "--optim.lr", "0.1", "--model.whiten=false")
    assert config.flags == {"log.wandb": "off", "optim.lr": "0.1", "model.whiten": "false"}
    assert split_training_flags(["x", "--a", "1", "--b.c", "-1"]) == (["x", "--a", "1"], {"b.c": "-1"})


def test_settings_are_what_the_protocol_has_a_use_for(parse):
    plain = to_plain(parse(CROSS))
    assert plain["flags"]["optim.lr"] == 0.5 and not FOREIGN["cross_generator"] & set(plain)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("protocol: sharpness", VIEWED, r"protocol\.yaml: .*sharpness"),
        ("protocol: [", VIEWED, r"protocol\.yaml"),
        ("{}", VIEWED, r"protocol"),
        (ROBUST + "colour: 1", VIEWED, r"protocol\.yaml: .*colour"),
        ("protocol: robustness", VIEWED, "operations, chains and genimage are all empty"),
        ("protocol: robustness\noperations: {sepia: [1]}", VIEWED, "no operation 'sepia'; there are jpeg"),
        (
            "protocol: robustness\noperations: {jpeg: [0]}",
            VIEWED,
            r"operations\.jpeg: severity 0, expected a whole number from 1 to 100",
        ),
        (
            "protocol: robustness\noperations: {jpeg: [9, 9.0]}",
            VIEWED,
            r"operations\.jpeg: 9\.0 is given twice",
        ),
        ("protocol: robustness\noperations: {blur: [.nan]}", VIEWED, "severity nan"),
        ("protocol: robustness\nchains: [6]", VIEWED, "chains: 6 operations, expected 1 to 5"),
        ("protocol: aligned\nviews: [raw, odd]", VIEWED, "no view 'odd'; there are raw, jpeg_fakes"),
        ("protocol: aligned\nquality: 101", VIEWED, "quality is 101, expected 1 to 100"),
        ("protocol: aligned\nsubsampling: 3", VIEWED, r"protocol\.yaml: .*subsampling"),
        ("protocol: aligned\nimages: -1", VIEWED, "images is -1, expected 0 or more"),
        ("protocol: aligned\nchains: [1]", VIEWED, "chains: the aligned protocol has no use for it"),
        (ROBUST, VIEWED[2:], "checkpoint: missing"),
        (ROBUST, VIEWED[:2], "originals: give --layout and --source, or --shards"),
        (ROBUST, VIEWED[:4], "source: missing; --layout and --source go together"),
        (ROBUST, [*VIEWED, "--shards", "x"], "and not both"),
        (ROBUST, [*VIEWED, "--optim.lr", "1"], r"--optim\.lr: the robustness protocol trains nothing"),
        (ROBUST, [*VIEWED, "--seed", "x"], "seed"),
        (CROSS, ["--images", "5"], "images: the cross_generator protocol has no use for it"),
        (CROSS, ["--run.dir", "x"], r"flags\.run\.dir: the protocol sets it itself"),
        (CROSS, ["--data.generators", "[adm]"], r"flags\.data\.generators: the protocol sets it itself"),
        (CROSS, ["--shards", ""], "shards: missing; the cross_generator protocol needs it"),
        (CROSS, ["--optim.lr"], r"--optim\.lr: expected a value after it"),
    ],
)
def test_mistakes_are_one_line(parse, text, words, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(text, *words)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line():
    for words in (["nowhere.yaml"], [], ["--output", "x"]):
        with pytest.raises(UserError, match=r"nowhere\.yaml: no such file|expected a YAML file first"):
            parse_command(words)
