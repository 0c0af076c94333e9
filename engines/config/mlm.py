"""The configuration of a finetuning run of TinyLLaVA, read by `engines.config.parser`."""

from dataclasses import dataclass, field
from typing import Literal

from engines.config.base import RunConfig, check_checkpoints, check_duration
from engines.runtime.run_log import LogConfig
from models.tinyllava.config import TINY


@dataclass(kw_only=True)
class GenerateConfig:
    """A synthetic conversation set, for the quickstart and tests; written unless it exists."""

    images: int = 0
    """Number of synthetic images; 0: none."""
    size: int = 56
    """Side of an image, pixels."""
    questions: int = 0
    """Training conversations about them."""
    val: int = 40
    """Validation conversations."""
    benchmark: int = 40
    """Items of each benchmark."""
    seed: int = 0
    """Seed of the images and questions."""


@dataclass(kw_only=True)
class ConversationsConfig:
    """The conversations to learn, in LLaVA's format."""

    conversations: str = "data/vqa/conversations.json"
    """JSON file, folder with conversations.json, or folder of WebDataset tars."""
    images: str = ""
    """Folder that image paths are relative to; empty: the conversations' own."""
    val: str = ""
    """Validation conversations in the same form; empty: `val_fraction` of the conversations."""
    val_fraction: float = 0.0
    """Share of the conversations held out for validation where `val` is empty; by image."""
    max_length: int = 3072
    """Longest conversation, tokens with the image's; longer ones are rejected."""
    group_by_length: bool = True
    """Batch conversations of similar length, for less padding."""
    skip_rejected: bool = False
    """Leave out rejected samples (listed in RUN/rejected.csv); false: they stop the run."""
    check_images: bool = True
    """Decode every image once before training."""
    workers: int = 2
    """Processes per GPU that read and decode images; 0: none."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """A synthetic conversation set, written unless it exists."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction is {self.val_fraction}, expected [0, 1)")
        if self.max_length < 16 or self.workers < 0:
            raise ValueError("data.max_length must be at least 16 and data.workers 0 or more")


@dataclass(kw_only=True)
class TinyLlavaConfig:
    """The model to start from."""

    weights: str = TINY
    """Folder of the published checkpoint or of one saved by telltale; random:tiny: a small random model."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on a GPU and fp32 on a CPU; fp16 is what the reference uses."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel."""
    dropout: float = -1.0
    """Phi-2's residual dropout; -1 keeps the model's own (0.1)."""

    def __post_init__(self) -> None:
        if self.dropout != -1 and not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}, expected [0, 1), or -1 for the model's own")


@dataclass(kw_only=True)
class TuneConfig:
    """Which parts of the model learn, and how."""

    language: Literal["full", "lora", "dora", "qlora", "frozen"] = "lora"
    """The language model: full, adapters (qlora: on 4-bit weights, needs a GPU), or frozen."""
    connector: bool = True
    """Train the connector."""
    vision: Literal["frozen", "partial", "full"] = "frozen"
    """The vision tower: frozen, partial (its layers from `vision_from_layer` on), or full."""
    vision_from_layer: int = 20
    """partial: the first layer that learns (the published tower has 27, the last is unused)."""
    lora_rank: int = 128
    """Rank of the adapters."""
    lora_alpha: int = 256
    """The adapters are scaled by alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout before the adapters."""

    def __post_init__(self) -> None:
        if self.lora_rank < 1 or self.lora_alpha < 1 or not 0 <= self.lora_dropout < 1:
            raise ValueError("tune.lora_rank and lora_alpha must be at least 1, tune.lora_dropout in [0, 1)")
        if self.language == "frozen" and not self.connector and self.vision == "frozen":
            raise ValueError(
                "tune: language, connector and vision are all frozen, so nothing would be learned"
            )
        if self.vision_from_layer < 0:
            raise ValueError(f"tune.vision_from_layer is {self.vision_from_layer}, expected 0 or more")

    @property
    def adapters(self) -> bool:
        return self.language in ("lora", "dora", "qlora")


@dataclass(kw_only=True)
class MlmOptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-4
    """Peak learning rate."""
    connector_lr: float = 0.0
    """Learning rate of the connector; 0: lr."""
    vision_lr: float = 0.0
    """Learning rate of the vision tower; 0: lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the averages of the gradients and of their squares."""
    weight_decay: float = 0.0
    """Weight decay; norms and biases have none."""
    warmup: float = 0.03
    """Fraction of the steps in which the rate rises linearly to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule of the rate after the warm-up: cosine or linear to zero, or constant."""
    clip: float = 1.0
    """Clip the gradient's norm to this; 0: do not clip, as the reference."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or min(self.connector_lr, self.vision_lr, self.weight_decay, self.clip) < 0:
            raise ValueError(
                "optim.lr must be above 0; connector_lr, vision_lr, weight_decay and clip 0 or more"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optim.warmup is {self.warmup}, expected [0, 1)")


@dataclass(kw_only=True)
class MlmTrainConfig:
    """The training loop."""

    epochs: float = 1.0
    """Passes over the conversations; ignored if steps is set."""
    steps: int = 0
    """Optimizer steps; 0: epochs decides."""
    global_batch: int = 128
    """Conversations per step over all GPUs, however many there are."""
    micro_batch: int = 4
    """The most conversations per GPU in a forward pass; with loss batches, how many are averaged together."""
    gradient_checkpointing: bool = True
    """Recompute activations instead of storing them: less memory, a third more computation."""
    loss: Literal["tokens", "batches"] = "tokens"
    """tokens: every learned token has the same weight; batches: average micro-batches, as the reference."""
    validate_every: int = 0
    """Steps between validations, each with a checkpoint; 0: once per epoch."""
    memory_check: bool = True
    """Do not start if the estimated memory exceeds the GPU's."""

    def __post_init__(self) -> None:
        check_duration(self.epochs, self.steps)
        if self.micro_batch < 1 or self.global_batch < 1 or self.validate_every < 0:
            raise ValueError(
                "train.global_batch and micro_batch must be at least 1, validate_every 0 or more"
            )


@dataclass(kw_only=True)
class MlmCheckpointConfig:
    """Checkpoints."""

    every: int = 0
    """Steps between checkpoints besides those at validations; 0: none. A stop and the last step always save."""
    keep: int = 2
    """How many checkpoints are kept, in addition to the best."""

    def __post_init__(self) -> None:
        check_checkpoints(self.every, self.keep)


@dataclass(kw_only=True)
class MlmEvaluateConfig:
    """Evaluation of the finished model."""

    benchmarks: list[str] = field(default_factory=list)
    """JSON files of items to answer."""
    batch: int = 8
    """Questions at a time."""


@dataclass(kw_only=True)
class FinetuneConfig:
    """Everything a finetuning run depends on."""

    run: RunConfig = field(default_factory=RunConfig)
    """The run and its folder."""
    data: ConversationsConfig = field(default_factory=ConversationsConfig)
    """The conversations to learn."""
    model: TinyLlavaConfig = field(default_factory=TinyLlavaConfig)
    """The model to start from."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """Which parts of the model learn."""
    optim: MlmOptimConfig = field(default_factory=MlmOptimConfig)
    """AdamW and its schedule."""
    train: MlmTrainConfig = field(default_factory=MlmTrainConfig)
    """The training loop."""
    checkpoint: MlmCheckpointConfig = field(default_factory=MlmCheckpointConfig)
    """Checkpoints."""
    evaluate: MlmEvaluateConfig = field(default_factory=MlmEvaluateConfig)
    """Evaluation of the finished model."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging; log.images has no effect here."""
    deepspeed: str = "configs/deepspeed/zero2.json"
    """DeepSpeed's JSON; see configs/deepspeed/."""
    resume: str = "auto"
    """auto: the newest complete checkpoint; none: start from the beginning; or a checkpoint's folder."""


FINETUNE_FREE_KEYS = frozenset(
    [
        "resume",
        "run.dir",
        "data.conversations",
        "data.images",
        "data.val",
        "data.check_images",
        "data.workers",
        "model.weights",
        "train.memory_check",
        "checkpoint.every",
        "checkpoint.keep",
        "evaluate.benchmarks",
        "evaluate.batch",
        "log.every",
        "log.images",
        "log.wandb",
        "log.project",
        "log.group",
        "log.artifacts",
        "log.tensorboard",
        "train.micro_batch",  # changes only rounding, but with train.loss batches: see `engines.mlm.resume`
        *(f"data.generate.{key}" for key in ("images", "size", "questions", "val", "benchmark", "seed")),
    ]
)
