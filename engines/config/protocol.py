"""The configuration of a protocol: a YAML file under flags, checked before anything is read."""

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dataio.core.errors import UserError
from dataio.layouts.registry import layout_names
from dataio.perturb.aligned_views import VIEWS
from dataio.perturb.degradations import GENIMAGE, MAX_CHAIN, Operation, check_operation
from engines.config.parser import Parser
from engines.runtime.paths import find_config
from engines.runtime.wandb_mode import WANDB_HELP, WANDB_MODES

# A string first: with any other order "off" would become a boolean.
Flag = str | bool | int | float | list[Any]
TRAINED = ("cross_generator", "leave_one_out")  # several checkpoints see one set of shards


@dataclass(kw_only=True)
class ProtocolConfig:
    """What a protocol asks and of what."""

    protocol: Literal["robustness", "aligned", "cross_generator", "leave_one_out"]
    """robustness: degradations by severity; aligned: views without shortcuts; cross_generator: train on one
    generator, test on all; leave_one_out: train on all but one."""
    checkpoint: str = ""
    """robustness, aligned: best.pt, a file of RUN/checkpoints, final.safetensors or an export."""
    layout: str = ""
    """robustness, aligned: how the originals are laid out, as for telltale shard."""
    source: str = ""
    """robustness, aligned: folder, zip or CSV of the originals."""
    val_labels: str = ""
    """genimage: LOC_val_solution.csv or the devkit's ground truth."""
    root: str = ""
    """manifest: where its paths start."""
    real: str = ""
    """manifest: the generators that are photographs, with commas between them."""
    subsets: list[str] = field(default_factory=list)
    """genimage: only these generators' folders."""
    split_from_path: bool = False
    """manifest: splits are the paths' first folders."""
    halve_test: bool = False
    """val is half of the official test, as in the reference."""
    skip_unknown: bool = False
    """Leave files that fit no pattern out."""
    shards: str = ""
    """robustness, aligned: instead of layout and source, shards kept with --codec.preset keep;
    cross_generator, leave_one_out: the shards to train and test on."""
    split: str = "test"
    """The split that is evaluated."""
    images: int = 0
    """robustness, aligned: a seeded subset of so many images, the same in every cell; 0 takes all."""
    seed: int = 0
    """Of the subset and of what is drawn for each image."""
    operations: dict[str, list[float]] = field(default_factory=dict)
    """robustness: severities of each operation (jpeg, webp: quality; resize: factor; blur, noise: sigma;
    crop: share of the side; short_side: pixels)."""
    chains: list[int] = field(default_factory=list)
    """robustness: numbers of operations in a row, drawn for each image."""
    genimage: bool = False
    """robustness: GenImage's own six: LR112, LR64, JPEG65, JPEG30, blur3, blur5."""
    views: list[str] = field(default_factory=lambda: list(VIEWS))
    """aligned: which of raw, jpeg_fakes, jpeg_all, history, size; raw is always there."""
    quality: int = 96
    """aligned: JPEG quality of jpeg_fakes and jpeg_all."""
    subsampling: Literal[0, 1, 2] = 2
    """aligned: of those JPEGs: 2 is 4:2:0, as UnbiasedGenImage has it; 1 is 4:2:2, 0 is 4:4:4."""
    size: int = 0
    """aligned: side of view size, pixels; 0 takes the shortest side of any generated image."""
    config: str = ""
    """cross_generator, leave_one_out: the trainings' YAML file, as for telltale train."""
    flags: dict[str, Flag] = field(default_factory=dict)
    """cross_generator, leave_one_out: what the trainings change of it."""
    generators: list[str] = field(default_factory=list)
    """cross_generator, leave_one_out: the generators of the matrix; empty takes all that have training images."""
    weights: Literal["best", "last"] = "best"
    """cross_generator, leave_one_out: which weights of a run are evaluated."""
    processes: int = 1
    """cross_generator, leave_one_out: processes of each training."""
    batch: int = 0
    """robustness, aligned: images per forward pass; 0 takes 4 times the training's."""
    workers: int = 0
    """robustness, aligned: processes that encode images; 0 takes all cores."""
    samples_per_shard: int = 1000
    """robustness, aligned: images in one tar."""
    keep_shards: bool = False
    """robustness, aligned: keep each cell's shards."""

    def __post_init__(self) -> None:
        for key in ("images", "size", "batch", "workers"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}, expected 0 or more")
        for key in ("processes", "samples_per_shard"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, expected at least 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}, expected 1 to 100")
        for view in self.views:
            if view not in VIEWS:
                raise ValueError(f"views: no view {view!r}; there are {', '.join(VIEWS)}")
        for key in ("views", "chains", "generators"):
            _check_once(key, getattr(self, key))
        for length in self.chains:
            if not 1 <= length <= MAX_CHAIN:
                raise ValueError(f"chains: {length} operations, expected 1 to {MAX_CHAIN}")
        for name, severities in self.operations.items():
            for severity in severities:
                check_operation(Operation(name, severity), "operations")
            _check_once(f"operations.{name}", severities)
        self._check_keys()
        self._check_source()

    def _check_keys(self) -> None:
        """Refuse keys that the protocol does not use."""
        for name in sorted(FOREIGN[self.protocol]):
            if getattr(self, name) != _defaults()[name]:
                raise ValueError(f"{name}: the {self.protocol} protocol has no use for it; remove it")
        if self.protocol == "robustness" and not (self.operations or self.chains or self.genimage):
            raise ValueError(
                "operations, chains and genimage are all empty; the robustness protocol needs one"
            )

    def _check_source(self) -> None:
        if self.protocol in TRAINED:
            for key in ("run.dir", "data.shards", "data.generators", "config", "resume"):
                if key in self.flags:
                    raise ValueError(f"flags.{key}: the protocol sets it itself; remove it")
            for key in ("config", "shards"):
                if not getattr(self, key):
                    raise ValueError(f"{key}: missing; the {self.protocol} protocol needs it (--{key})")
            return
        if not self.checkpoint:
            raise ValueError("checkpoint: missing; give --checkpoint RUN/best.pt")
        if self.layout and self.layout not in layout_names():
            raise ValueError(f"layout is {self.layout!r}, expected one of {', '.join(layout_names())}")
        if bool(self.shards) == bool(self.layout or self.source):
            raise ValueError(
                "originals: give --layout and --source, or --shards kept with --codec.preset keep, and not both"
            )
        if not self.shards and not (self.layout and self.source):
            raise ValueError(
                f"{'source' if self.layout else 'layout'}: missing; --layout and --source go together"
            )

    def all_operations(self) -> dict[str, Operation]:
        """Every single operation by the name of its cell, in order."""
        operations = {
            str(operation): operation
            for name, severities in self.operations.items()
            for operation in (Operation(name, severity) for severity in severities)
        }
        return {**operations, **(GENIMAGE if self.genimage else {})}


def _check_once(key: str, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}: {value}, expected a finite number")
        if list(values).count(value) > 1:
            raise ValueError(f"{key}: {value} is given twice; remove one")


def _defaults() -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for entry in fields(ProtocolConfig):
        made = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        defaults[entry.name] = made
    return defaults


_VIEWED_KEYS = frozenset(
    ["checkpoint", "layout", "source", "val_labels", "root", "real", "subsets", "split_from_path"]
) | frozenset(
    ["halve_test", "skip_unknown", "images", "batch", "workers", "samples_per_shard", "keep_shards"]
)
_TRAINED_KEYS = frozenset(["config", "flags", "generators", "weights", "processes"])
_OWN_KEYS = {
    "robustness": frozenset(["operations", "chains", "genimage"]),
    "aligned": frozenset(["views", "quality", "subsampling", "size"]),
}
# Which keys each protocol has no use for.
FOREIGN = {
    "robustness": _TRAINED_KEYS | _OWN_KEYS["aligned"],
    "aligned": _TRAINED_KEYS | _OWN_KEYS["robustness"],
    "cross_generator": _VIEWED_KEYS | _OWN_KEYS["robustness"] | _OWN_KEYS["aligned"],
    "leave_one_out": _VIEWED_KEYS | _OWN_KEYS["robustness"] | _OWN_KEYS["aligned"],
}
# Keys that may change between a run and its continuation: they change no result.
FREE = frozenset(["workers", "keep_shards", "processes"])


def make_protocol_parser(doc: str | None = "") -> Parser:
    """The parser of a protocol's command line; doc is shown in its help, see `Parser`."""
    parser = Parser(
        "protocol", doc, usage="telltale protocol FILE.yaml --output DIR [options]", default_env=False
    )
    add = parser.add_argument_group("Command").add_argument
    add("--config-file", action="config", help="the YAML file; the same as FILE.yaml")
    add("--output", required=True, help="folder of the results")
    task_help = (
        "do only share i of n of the cells, i from 0 to n-1; shares may run at once on one file system"
    )
    add("--task", default=None, metavar="i/n", help=task_help)
    add("--wandb", choices=WANDB_MODES, default="auto", help=WANDB_HELP)
    add("--finish", action="store_true", help="merge what the tasks did, or name what is missing")
    parser.add_class_arguments(ProtocolConfig, nested_key=None)
    return parser


@dataclass(frozen=True)
class Command:
    """A parsed command line: the protocol, its folder, and which part of it to do."""

    config: ProtocolConfig
    output: Path
    task: str | None
    finish: bool
    wandb: str = "off"


def parse_command(words: Sequence[str]) -> Command:
    """Parse `FILE.yaml --output DIR ...`; flags win over the file.

    Raises:
        UserError: no file, unknown keys or values, keys that do not fit the protocol.
    """
    command_words, flags = split_training_flags(words)
    parser = make_protocol_parser()
    if not command_words or command_words[0].startswith("-"):
        raise UserError("expected a YAML file first, such as configs/protocols/robustness.yaml (see --help)")
    path = find_config(command_words[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file; see the configs/protocols folder")
    try:
        # By itself first, so that its errors name it; what it leaves out may be in the flags.
        parser.parse_args(["--config-file", str(path), "--output", "."])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    parsed = parser.parse_args(["--config-file", str(path), *command_words[1:]])
    chosen = {entry.name: parsed[entry.name] for entry in fields(ProtocolConfig)}
    if flags and chosen["protocol"] not in TRAINED:
        raise UserError(f"--{next(iter(flags))}: the {chosen['protocol']} protocol trains nothing; remove it")
    chosen["flags"] = {**chosen["flags"], **flags}
    try:
        config = ProtocolConfig(**chosen)
    except ValueError as error:
        raise UserError(f"{error} (from {path} and the flags)") from None
    except UserError as error:
        raise UserError(f"{error} (from {path} and the flags)") from None
    return Command(config, Path(parsed.output), parsed.task, parsed.finish, parsed.wandb)


def split_training_flags(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Our own words, and the dotted flags as {key: value}, which are train.py's.

    Raises:
        UserError: a dotted flag without a value.
    """
    command_words: list[str] = []
    flags: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not (name.startswith("--") and "." in name):
            # --val-labels is what shard.py calls it.
            command_words.append(
                f"--{name[2:].replace('-', '_')}{equals}{value}" if _is_renamed(name) else word
            )
            continue
        if not equals:
            given = next(rest, None)
            if given is None:
                raise UserError(f"{name}: expected a value after it")
            value = given
        flags[name.removeprefix("--")] = value
    return command_words, flags


def _is_renamed(name: str) -> bool:
    return name.startswith("--") and name[2:].replace("-", "_") in _VIEWED_KEYS | {"samples_per_shard"}


def to_plain(config: ProtocolConfig) -> dict[str, Any]:
    """Only what the protocol has a use for, as JSON values."""
    plain = {key: value for key, value in asdict(config).items() if key not in FOREIGN[config.protocol]}
    if not config.real:  # absent from older folders
        plain.pop("real", None)
    return plain
