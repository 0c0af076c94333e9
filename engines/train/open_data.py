"""The splits of a training run: drawn if they are synthetic, opened, and prepared for damaged samples."""

from pathlib import Path

from dataio.core.errors import UserError
from dataio.core.log import log
from dataio.loading.quarantine import Quarantine
from dataio.shards.local_cache import CacheOptions
from dataio.shards.remote_cache import default_cache, default_cap
from dataio.shards.shard_set import ShardSet
from dataio.sources.remote_path import is_url
from engines.config.detector import Config


def draws_shards(config: Config) -> bool:
    """Whether `ensure_shards` would draw them."""
    data = config.data
    if data.synthetic.images == 0 or is_url(data.shards):
        return False  # only a folder of this machine is drawn
    return not (Path(data.shards) / "manifest.json").is_file()


def ensure_shards(config: Config) -> None:
    """Draw the synthetic shards of `data.synthetic` if the folder has none yet."""
    if not draws_shards(config):
        return
    synthetic = config.data.synthetic
    from dataio.sharding.quickstart import make_synthetic_shards

    log.info(f"drawing {synthetic.images} synthetic images of {synthetic.size} px into {config.data.shards}")
    make_synthetic_shards(
        config.data.shards, images=synthetic.images, size=synthetic.size, seed=synthetic.seed
    )


def open_sets(config: Config, *, cached: bool = True) -> tuple[ShardSet, ShardSet | None]:
    """The training split and the validation split, None where that is empty, as `data` has them read.

    Args:
        cached: through `data.cache_dir`, which is created; false to leave it alone. Shards behind a URL have a
            cache in any case.

    Raises:
        UserError: see `ShardSet`; a cache folder that cannot be written; a training split without
            photographs or without fakes, unless `data.allow_one_class` is set.
    """
    data = config.data
    chosen = {"subsets": data.subsets, "generators": data.generators}
    cache = _cache_of(config) if cached or is_url(data.shards) else None
    train_set = ShardSet(data.shards, "train", **chosen, verify=data.verify, cache=cache)
    if train_set.missing_class and not data.allow_one_class:
        selected = " that data.subsets and data.generators select" if data.subsets or data.generators else ""
        raise UserError(
            f"{data.shards}: no {train_set.missing_class} among the {len(train_set)} training images{selected}, so "
            "real or fake cannot be learned; shard both, or set data.allow_one_class true"
        )
    has_val = train_set.manifest["splits"].get("val", {}).get("samples", 0) > 0
    val_set = ShardSet(data.shards, "val", **chosen, verify=data.verify, cache=cache) if has_val else None
    return train_set, val_set


def _cache_of(config: Config) -> CacheOptions | None:
    data = config.data
    strict = data.damaged == "stop"
    if data.cache_dir:
        return CacheOptions(data.cache_dir, data.cache_gib, strict, data.remote_patience)
    if not is_url(data.shards):
        return None
    folder = default_cache()
    return CacheOptions(folder, data.cache_gib or default_cap(folder), strict, data.remote_patience)


def open_quarantine(config: Config, shards: ShardSet | None) -> Quarantine | None:
    """Where a split's damaged samples are listed; None where such a sample stops the run.

    Raises:
        UserError: the run's list cannot be read.
    """
    if shards is None or config.data.damaged == "stop":
        return None
    return Quarantine(shards, Path(config.run.dir) / "quarantine.jsonl", config.data.damaged_cap)
