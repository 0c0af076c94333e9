"""A checkpoint's contract: images are coded as those that it was trained on.

Figures on images of another codec policy say little about a detector, and `telltale predict`,
which follows the checkpoint's policy, gives other verdicts on the same sources.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from dataio.core.errors import UserError
from dataio.images.codec import CodecPolicy
from dataio.shards.manifest import label_mismatch, read_manifest, sha256_of
from dataio.shards.shard_set import ShardSet
from dataio.sources.remote_path import is_url
from engines.checkpoint import files as checkpoints
from engines.checkpoint.export_format import PREPROCESSING, read_export

_NOT_PIXELS = ("preset", "max_megapixels", "match_history")  # the last counts by its histogram
_OF_RECODING = ("size", "quality", "subsampling", "history")  # without effect on files that are kept
_FIELDS = [field.name for field in fields(CodecPolicy)]
_DEFAULTS = {field.name: field.default for field in fields(CodecPolicy) if field.default is not MISSING}
_ENTRIES = 4  # of a JPEG history in a message
_SIDES = ("in the shards", "in training")


def codec_differences(
    ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None, sides: tuple[str, str] = _SIDES
) -> list[str]:
    """What differs between two codec policies and can change pixels, in words; [] if nothing.

    Args:
        ours, theirs: from a manifest and a checkpoint; what older files lack has `CodecPolicy`'s
            defaults. None, where a file records no policy, differs from nothing.
        sides: how the text names the two.
    """
    if ours is None or theirs is None:
        return []
    one, two = _effect(ours), _effect(theirs)
    names = dict.fromkeys([*_FIELDS, *one, *two])
    changed = [name for name in names if one.get(name) != two.get(name)]
    if "keep" in (one.get("resize"), two.get("resize")):
        changed = [name for name in changed if name not in _OF_RECODING]
    differences = []
    plain = [name for name in changed if name != "history"]
    if plain:
        first = ", ".join(f"{name} {_plain(ours, name)}" for name in plain)
        second = ", ".join(
            f"{name if len(plain) > 1 else ''} {_plain(theirs, name)}".strip() for name in plain
        )
        differences.append(f"codec policy: {first} {sides[0]}, {second} {sides[1]}")
    if "history" in changed:
        first, second = _history_text(ours, one), _history_text(theirs, two)
        differences.append(f"JPEG history: {first} {sides[0]}, {second} {sides[1]}")
    return differences


def _effect(codec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a policy that can change pixels."""
    values = {**_DEFAULTS, **codec}
    history, resize = values.get("history"), values.get("resize")
    if not values.get("match_history") or not isinstance(history, dict) or resize == "squash":
        values["history"] = None
    elif len(history) < 2:  # every draw gives the same
        values["history"] = sorted(history) or None
    ignored = (*_NOT_PIXELS, *(_OF_RECODING if resize == "keep" else ()))
    return {name: value for name, value in values.items() if name not in ignored}


def _plain(codec: Mapping[str, Any], name: str) -> str:
    return str({**_DEFAULTS, **codec}.get(name, "not recorded"))


def _history_text(codec: Mapping[str, Any], effect: Mapping[str, Any]) -> str:
    if not effect.get("history"):
        return "none"
    counts = sorted(codec["history"].items(), key=lambda item: -item[1])
    shown = [f"{name} ({count} images)" for name, count in counts[:_ENTRIES]]
    more = [f"{len(counts) - _ENTRIES} more"] if len(counts) > _ENTRIES else []
    return ", ".join(shown + more)


def preprocessing_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between the `data` sections of two runs and changes the network's input, in words."""
    return [
        f"data.{name}: {ours[name]} here, {theirs[name]} in its training"
        for name in PREPROCESSING
        if name in ours and name in theirs and _number(ours[name]) != _number(theirs[name])
    ]


def _number(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_shards(
    checkpoint: str | Path, info: Mapping[str, Any], shards: ShardSet, *, other_codec: bool = False
) -> dict[str, Any]:
    """Check that shards are what a checkpoint was trained for, and describe them.

    Args:
        info: as `engines.checkpoint.load_model.load_model` gives it.
        other_codec: accept another codec policy; the description names the differences.

    Returns:
        folder, split, images (a number), manifest_sha256, plan_sha256 (or None), codec,
        codec_equal (None where the checkpoint records no policy) and codec_differences.

    Raises:
        UserError: the label spaces or the codec policies differ.
    """
    mismatch = label_mismatch(info["labels"], shards.labels)
    if mismatch:
        raise UserError(
            f"{checkpoint}: its {mismatch} ({shards.folder}); evaluate on shards of the same label space"
        )
    theirs, ours = info.get("codec"), shards.manifest["codec"]
    differences = codec_differences(ours, theirs)
    if differences and not other_codec:
        raise other_codec_error(str(shards.folder), checkpoint, differences)
    plan = shards.manifest.get("plan")
    return {
        "folder": str(shards.folder),
        "split": shards.split,
        "images": len(shards),
        "manifest_sha256": sha256_of(shards.folder / "manifest.json"),
        "plan_sha256": plan.get("sha256") if isinstance(plan, dict) else None,
        "codec": ours,
        "codec_equal": None if theirs is None else not differences,
        "codec_differences": differences,
    }


def other_codec_error(data: str, checkpoint: str | Path, differences: list[str]) -> UserError:
    """The refusal of images that are coded differently than a checkpoint's."""
    return UserError(
        f"{data}: coded differently than the images that {checkpoint} was trained on ({'; '.join(differences)}); "
        f"shard them again with --codec.from {checkpoint}, or accept it with other_codec (--other-codec)"
    )


def policy_from(path: str | Path) -> CodecPolicy:
    """The codec policy of a run, checkpoint, export or shard folder, its JPEG history included.

    Raises:
        UserError: none of these, or it records no policy that this telltale knows.
    """
    place = Path(path)
    if is_url(path) or (place / "manifest.json").is_file():
        codec = read_manifest(path)["codec"]
    else:
        place = checkpoints.locate(place)
        codec = (read_export(place) if place.is_dir() else checkpoints.load(place)).get("codec")
    return trained_policy(codec, path)


def trained_policy(codec: Mapping[str, Any] | None, path: str | Path) -> CodecPolicy:
    """A recorded policy, to be followed exactly: where it has no JPEG history, none is looked for.

    Raises:
        UserError: no policy, or one that this telltale does not know.
    """
    if codec is None:
        raise UserError(f"{path}: records no codec policy; give a checkpoint that telltale train wrote")
    try:
        policy = CodecPolicy.from_dict(dict(codec))
    except TypeError as error:
        raise UserError(
            f"{path}: its codec policy is unknown to this telltale ({error}); update it"
        ) from None
    # None would be planned anew, from the sources at hand.
    return replace(policy, history=policy.history or {}) if policy.match_history else policy
