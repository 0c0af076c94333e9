"""Splits as a threshold on a hash of a name, so that adding a file moves no other."""

from dataio.core.counter_rng import hash_text


def share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return hash_text(name) / 2.0**64


def train_or_val(name: str, val_fraction: float) -> str:
    """Give "val" for about `val_fraction` of all names, else "train"."""
    return "val" if share(name) < val_fraction else "train"


def split_of(name: str, in_test: bool, val_fraction: float, halve_test: bool) -> str:
    """The split of an image of a data set that has an official train and an official test.

    Args:
        name: what the image is known by. in_test: whether it is in the official test.
        val_fraction: share of train that becomes val.
        halve_test: leave train whole and let half of the official test be val, as the
            reference project has it; its test figures are not those of the whole test.
    """
    if in_test:
        return "val" if halve_test and share(name) < 0.5 else "test"
    return "train" if halve_test else train_or_val(name, val_fraction)
