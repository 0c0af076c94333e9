"""Synthetic shards in one call: what the quickstart trains on."""

from pathlib import Path
from typing import Any

from dataio.images.codec import preset_policy
from dataio.layouts.synthetic import SyntheticLayout, write_synthetic
from dataio.sharding.job import write_shards


def make_synthetic_shards(output: str | Path, *, images: int, size: int, seed: int) -> dict[str, Any]:
    """Draw a synthetic GenImage beside `output` and shard it.

    Args:
        output: shard folder; the drawn files go to `<output>-source`.
        images: how many to draw. size: their side, pixels. seed: of the drawing.

    Returns:
        the manifest.

    Raises:
        UserError: see `write_synthetic` and `write_shards`.
    """
    output = Path(output)
    source = output.with_name(f"{output.name}-source")
    write_synthetic(source, images=images, size=size, seed=seed)
    # One process: the caller may be a training rank, which must not start more of itself.
    return write_shards(
        SyntheticLayout(source, val_fraction=0.1),
        output,
        preset_policy("default", size),
        workers=1,
        samples_per_shard=250,
        quiet=True,
    )
