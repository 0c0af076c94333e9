"""The configuration of a training run: typed, checked, saved with the run.

Defaults live here and in the classes beside the code that uses them; `engines.config.parser`
reads it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dataio.core.errors import UserError
from dataio.loading.config import DataConfig
from engines.config.base import RunConfig, check_checkpoints, check_duration
from engines.config.parser import instantiate, make_parser, parse_as
from engines.runtime.run_log import LogConfig
from models.detector.config import ModelConfig


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd (Nesterov momentum) or adamw."""
    lr: float = 0.1
    """Peak learning rate."""
    lr_batch: int = 0
    """Images a step that lr and frozen_lr are for: both are multiplied by train.global_batch / lr_batch. 0: neither."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = True
    """SGD looks ahead along its momentum (Nesterov)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    weight_decay: float = 5e-5
    """On weights only; norms and biases have none."""
    decay_norms: bool = False
    """Decay norms and biases too."""
    schedule: Literal["cosine", "linear", "constant", "plateau"] = "cosine"
    """After the warm-up the rate falls to lr * final, stays, or is cut where validation no longer improves."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly to its peak."""
    final: float = 0.0
    """Share of the peak rate at the end of the schedule."""
    plateau_factor: float = 0.1
    """plateau: the rate is multiplied by this."""
    plateau_patience: int = 3
    """plateau: after more than so many validations without improvement of checkpoint.best's metric."""
    plateau_threshold: float = 0.01
    """plateau: the least relative improvement that counts."""
    frozen_lr: float = 0.0
    """Constant rate of the heads during train.frozen_epochs; 0 takes lr."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr is {self.lr}, expected a number above 0")
        if self.lr_batch < 0:
            raise ValueError(f"optim.lr_batch is {self.lr_batch}, expected 0 or a number of images")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum is {self.momentum}, expected [0, 1)")
        if self.weight_decay < 0 or self.clip < 0:
            raise ValueError("optim.weight_decay and optim.clip must be 0 or more")
        if not 0 <= self.warmup < 1 or not 0 <= self.final <= 1:
            raise ValueError("optim.warmup must be in [0, 1) and optim.final in [0, 1]")
        if (
            not 0 < self.plateau_factor < 1
            or not 0 <= self.plateau_threshold < 1
            or self.plateau_patience < 0
        ):
            raise ValueError(
                "optim.plateau_factor must be in (0, 1), plateau_threshold in [0, 1), plateau_patience 0 or more"
            )
        if self.frozen_lr < 0:
            raise ValueError(f"optim.frozen_lr is {self.frozen_lr}, expected 0 or more")


@dataclass(kw_only=True)
class LossConfig:
    """What is minimised: generator * CE(generator) + object * CE(object)."""

    generator: float = 1.0
    """Weight of the generator head."""
    object: float = 1.0
    """Weight of the object head; images of unknown object do not count in it."""
    label_smoothing: float = 0.0
    """Of both heads."""
    class_weights: Literal["none", "inverse", "inverse_sqrt"] = "none"
    """Weigh the generator head's classes by one over their count (or its root), with mean 1 over the images."""

    def __post_init__(self) -> None:
        if self.generator < 0 or self.object < 0 or self.generator + self.object == 0:
            raise ValueError("loss.generator and loss.object must be 0 or more and not both 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing is {self.label_smoothing}, expected [0, 1)")


@dataclass(kw_only=True)
class MixConfig:
    """Mixing pairs of training images, on both heads."""

    mixup: float = 0.0
    """Alpha of MixUp's Beta(alpha, alpha); 0 does not blend. Zhang et al., 2018."""
    cutmix: float = 0.0
    """Alpha of CutMix's; 0 does not paste. Yun et al., 2019. With both, each takes half of the micro-batches."""
    probability: float = 1.0
    """Share of the micro-batches that are mixed at all."""

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError("mix.mixup and mix.cutmix must be 0 or more")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"mix.probability is {self.probability}, expected [0, 1]")


@dataclass(kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: float = 1.0
    """Passes over the training split; unused where steps is given."""
    steps: int = 0
    """Optimizer steps; 0 means epochs decides."""
    global_batch: int = 256
    """Images per step over all processes; the result depends on it, not on their number."""
    micro_batch: int = 64
    """Images whose statistics batch norm takes (a ghost batch), on any number of processes. 0: global_batch."""
    pass_images: int | Literal["auto"] = "auto"
    """Images per forward pass, whole micro-batches, however many: the result is the same. auto: what a GPU can hold."""
    graph: Literal["auto", "on", "off"] = "auto"
    """On a GPU: launch forward and backward as one CUDA graph. auto: where the options allow it; on: or stop."""
    frozen_epochs: float = 0.0
    """Epochs at the start in which only the heads learn, the backbone as in evaluation; -1: the whole run."""
    ema: float = 0.0
    """Decay per step of an average of the weights, which is then what is validated and kept as best; 0: none."""
    early_stop: int = 0
    """Stop after so many validations without improvement of checkpoint.best's metric; 0: never."""
    early_stop_after: float = 0.0
    """Early stopping does not look at validations within this many epochs."""
    early_stop_threshold: float = 0.0
    """Early stopping: the least relative improvement that counts."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on a GPU and fp32 on a CPU; fp16 scales its loss."""
    tf32: bool = False
    """fp32 on a GPU: products and convolutions of TensorFloat-32 factors (10 bits of mantissa), faster."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = True
    """Keep activations channels-last in memory, which convolutions like."""
    validate_every: int = 0
    """Steps between validations; 0 means once per epoch. The last step always validates."""
    threads: int = 1
    """CPU threads of PyTorch per process; more change the last bits of the result."""
    deterministic: bool = False
    """On a GPU: only algorithms whose bits repeat (slower); a CPU's always do."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops all processes before the update, or only that step is skipped."""
    nonfinite_cap: int = 10
    """skip: more skipped steps than this stop the run after all."""
    profile: str = ""
    """START:STOP traces these steps (from 0, STOP left out) into RUN/profile/rankN.json.gz; empty: none."""
    timeout: float = 10.0
    """Minutes without progress after which all processes end and the one that hangs is named; 0: never."""

    def __post_init__(self) -> None:
        check_duration(self.epochs, self.steps)
        self.micro_batch = self.micro_batch or self.global_batch
        if self.micro_batch < 1 or self.global_batch < 1:
            raise ValueError("train.global_batch must be at least 1 and train.micro_batch 0 or more")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch is {self.global_batch}, expected a multiple of train.micro_batch, "
                f"{self.micro_batch}"
            )
        if self.pass_images != "auto" and (self.pass_images < 1 or self.pass_images % self.micro_batch):
            raise ValueError(
                f"train.pass_images is {self.pass_images}, expected auto or a multiple of train.micro_batch, "
                f"{self.micro_batch}"
            )
        if self.graph == "on" and self.compile:
            raise ValueError("train.graph is on, but train.compile is set; set one of them to auto or false")
        if self.threads < 1 or self.validate_every < 0:
            raise ValueError("train.threads must be at least 1 and train.validate_every at least 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema is {self.ema}, expected a decay in [0, 1)")
        if min(self.early_stop, self.early_stop_after) < 0 or (
            self.frozen_epochs < 0 and self.frozen_epochs != -1
        ):
            raise ValueError(
                "train.early_stop and early_stop_after must be 0 or more, train.frozen_epochs too, or -1"
            )
        if not 0 <= self.early_stop_threshold < 1:
            raise ValueError(f"train.early_stop_threshold is {self.early_stop_threshold}, expected [0, 1)")
        if self.nonfinite_cap < 0 or self.timeout < 0:
            raise ValueError("train.nonfinite_cap and train.timeout must be 0 or more")
        parse_range(self.profile)


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is kept, and when."""

    every: int = 0
    """Steps between checkpoints; 0 means once per epoch. A stop and the last step always save."""
    keep: int = 2
    """How many checkpoints are kept; older ones are deleted."""
    background: bool = True
    """Copy the state and let a thread write it while training goes on; the files are the same."""
    best: Literal["generator_error", "real_fake_error", "object_error", "joint_error", "loss"] = "joint_error"
    """best.pt has the weights with the lowest of these on the validation split."""

    def __post_init__(self) -> None:
        check_checkpoints(self.every, self.keep)


@dataclass(kw_only=True)
class Config:
    """Everything a training run depends on."""

    run: RunConfig = field(default_factory=RunConfig)
    """The run and its folder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the images are and how they become tensors."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Mixing pairs of training images."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept, and when."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is written while the run goes."""
    resume: str = "auto"
    """auto continues the newest complete checkpoint; none starts anew in an empty folder; or a file."""

    def __post_init__(self) -> None:
        if self.data.sampling != "natural" and self.loss.class_weights != "none":
            raise ValueError(
                f"data.sampling {self.data.sampling} and loss.class_weights {self.loss.class_weights} both "
                "level the generators; use one of them"
            )


def parse_range(text: str) -> range:
    """The steps that "START:STOP" means, from 0, STOP left out; no steps for "".

    Raises:
        ValueError: anything else.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"train.profile is {text!r:.40}, expected START:STOP with START below STOP, such as 20:24"
        )
    return range(int(match[1]), int(match[2]))


def parse_config(argv: Sequence[str], default_file: str | Path) -> Config:
    """The configuration of a detector's training run; see `parse_as`."""
    return parse_as(Config, argv, default_file)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; keys a newer version added take their defaults.

    Raises:
        UserError: keys or values this version does not know.
    """
    parser = make_parser(Config)
    try:
        parsed = parser.parse_object(values)
    except UserError as error:
        raise UserError(f"stored configuration: {error}") from None
    return instantiate(parser, parsed, Path("the stored configuration"), Config)
