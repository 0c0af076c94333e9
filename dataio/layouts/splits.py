"""Splits as a threshold on a hash of a name, so that adding a file moves no other."""

import hashlib


def hash64(name: str) -> int:
    """64 bits that depend on the name alone."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return hash64(name) / 2.0**64


def train_or_val(name: str, val_fraction: float) -> str:
    """Give "val" for about `val_fraction` of all names, else "train"."""
    return "val" if share(name) < val_fraction else "train"
