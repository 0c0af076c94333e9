"""The configuration of the data: where the images are and how they become tensors."""

from dataclasses import dataclass, field
from typing import Literal

from dataio.loading.augment import AugmentConfig
from dataio.sources.remote_path import PATIENCE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(kw_only=True)
class SyntheticConfig:
    """A synthetic data set, drawn where `data.shards` does not exist yet."""

    images: int = 0
    """How many images to draw; 0 makes none."""
    size: int = 64
    """Side of the images, pixels."""
    seed: int = 0
    """Seed of the drawing."""

    def __post_init__(self) -> None:
        if self.images < 0 or self.size < 16:
            raise ValueError("data.synthetic: images must be >= 0 and size >= 16")


@dataclass(kw_only=True)
class DataConfig:
    """Where the images are and how they become tensors."""

    shards: str = "data/quickstart"
    """Folder written by telltale shard."""
    subsets: list[str] = field(default_factory=list)
    """Train and validate on these parts only (GenImage's generator folders); empty means all."""
    generators: list[str] = field(default_factory=list)
    """Train and validate on photographs and these generators only; empty means all. The heads stay as they are."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What else happens to training images."""
    resident: bool = False
    """Decode each split once, before the first step, and hold it on the device; images of one size, in each process."""
    sampling: Literal["natural", "balanced", "square_root"] = "natural"
    """How often each generator's images are drawn: as they are, equally, or by the root of their number."""
    size: int = 224
    """Side of the network's square input, pixels."""
    crop: Literal["random", "random_resized", "centre"] = "random_resized"
    """Training crop: random (never resampled), random_resized, or centre (as in evaluation)."""
    pad: int = 0
    """With crop random: pixels of padding (of the mean color) around the image first."""
    crop_step: int = 1
    """With crop random: shifts are multiples of this, pixels, so that a grid of that period stays where it is."""
    scale: tuple[float, float] = (0.35, 1.0)
    """With crop random_resized: range of the box's share of the area."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """With crop random_resized: range of the box's aspect ratio, width / height."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    eval_crop: float = 0.875
    """Evaluation takes the centered square of this share of the shortest side."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Then divided by."""
    window_shards: int = 16
    """How many shards are shuffled together; more mixes better, fewer reads more locally."""
    threads: int = 0
    """DALI's decoding threads per process; 0 means this process's share of the cores, and one more."""
    prefetch: int = 2
    """Batches that wait decoded, ahead of training; as many more are being decoded."""
    deterministic: bool = False
    """On a GPU: decode without the hardware engines, so that bits do not depend on load."""
    hw_decoder_load: float = 1.0
    """On a GPU: share of the baseline JPEGs decoded by its hardware engines; the rest takes kernels and CPU cores."""
    verify: bool = False
    """Check the SHA-256 of every shard before the first step."""
    cache_dir: str = ""
    """Folder of this machine for copies of the shards, which its processes and runs share; empty: none, or
    the user's cache folder where data.shards is a URL."""
    cache_gib: float = 0.0
    """The most that data.cache_dir may hold, GiB; the longest unused are evicted. 0: what the disk has."""
    remote_patience: float = PATIENCE
    """Seconds without an answer after which shards behind a URL are given up; below train.timeout."""
    damaged: Literal["stop", "skip"] = "stop"
    """A sample that cannot be read or decoded while training: stop, or skip it (RUN/quarantine.jsonl lists them)."""
    damaged_cap: float = 0.0001
    """With damaged skip: stop when more than this share of a split was skipped."""
    require_audit: bool = False
    """Refuse to train where the shards' audit (telltale audit) is a fail, missing or of other shards."""
    allow_one_class: bool = False
    """Train where the training split has no photographs, or no fakes: such a model cannot tell real from fake."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Makes the shards on first use (the quickstart)."""

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"data.size is {self.size}, expected at least 8 pixels")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is {self.flip}, expected a probability in [0, 1]")
        if not 0 < self.eval_crop <= 1:
            raise ValueError(f"data.eval_crop is {self.eval_crop}, expected a share in (0, 1]")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale is {list(self.scale)}, expected 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.ratio is {list(self.ratio)}, expected 0 < low <= high")
        if self.pad < 0 or (self.pad and self.crop != "random"):
            raise ValueError(f"data.pad is {self.pad}, expected 0, or more with data.crop random")
        if self.crop_step < 1 or (
            self.crop_step > 1 and (self.crop != "random" or self.pad % self.crop_step)
        ):
            raise ValueError(
                f"data.crop_step is {self.crop_step}, expected at least 1, and more only with data.crop random "
                f"and a data.pad (now {self.pad}) that is a multiple of it"
            )
        if min(self.std) <= 0:
            raise ValueError(f"data.std is {list(self.std)}, expected numbers above 0")
        if self.window_shards < 1 or self.prefetch < 1 or self.threads < 0:
            raise ValueError(
                "data.window_shards and data.prefetch must be at least 1, data.threads at least 0"
            )
        if self.resident:
            for name in ("rand_augment", "blur", "resize", "jpeg", "webp"):
                if getattr(self.augment, name):
                    raise ValueError(
                        f"data.augment.{name} is {getattr(self.augment, name)}, expected 0 with data.resident, "
                        "which crops, flips and erases only; set data.resident false"
                    )
        if not 0 <= self.damaged_cap <= 1:
            raise ValueError(f"data.damaged_cap is {self.damaged_cap}, expected a share in [0, 1]")
        if self.cache_gib < 0:
            raise ValueError(f"data.cache_gib is {self.cache_gib}, expected 0 or more")
        if self.remote_patience <= 0:
            raise ValueError(f"data.remote_patience is {self.remote_patience}, expected seconds above 0")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"data.hw_decoder_load is {self.hw_decoder_load}, expected a share in [0, 1]")
