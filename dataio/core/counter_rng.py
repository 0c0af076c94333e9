"""Random numbers as pure functions of a few integers, and hashes of names.

Counter-based: the finalizer of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014) over a running hash of 64-bit words. NumPy's generators are not
used because their streams may change between NumPy versions.
"""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_Words = NDArray[np.uint64] | np.uint64

# Purposes separate streams that share seed, epoch and position.
PURPOSE_SHARDS = 1
PURPOSE_SAMPLES = 2
PURPOSE_CROP = 3
PURPOSE_MIX = 4
PURPOSE_FORWARD = 5
PURPOSE_CLASSES = 6
PURPOSE_AUGMENT = 7
PURPOSE_SUBSTITUTE = 8


def hash64(*words: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash a sequence of 64-bit words; arrays broadcast.

    Returns:
        uint64 array of the words' broadcast shape, uniform over 64 bits.
    """
    state: _Words = np.uint64(0)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        for word in words:
            state = _absorbed(state, np.asarray(word).astype(np.uint64))
    return np.asarray(state)


def _absorbed(state: _Words, word: _Words) -> _Words:
    """The running hash after one more word."""
    state = (state ^ (word + _GOLDEN)) + _GOLDEN
    state = (state ^ (state >> _SHIFT_1)) * _MIX_1
    state = (state ^ (state >> _SHIFT_2)) * _MIX_2
    return state ^ (state >> _SHIFT_3)


@lru_cache(maxsize=64)
def _prefix(seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    """The running hash of the words that all positions of an epoch share, uint64 [1]."""
    return hash64(seed, epoch, purpose).reshape(1)


def uniforms(
    seed: int, epoch: int, purpose: int, position: NDArray[np.int64], draws: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1): the draws 0..draws-1 of each position, float64 [draws, *position.shape]."""
    state = _absorbed(_prefix(seed, epoch, purpose), position.astype(np.uint64))
    numbers = np.arange(draws, dtype=np.uint64).reshape(-1, *[1] * position.ndim)
    bits = np.asarray(_absorbed(state, numbers))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(
    seed: int, epoch: int, purpose: int, position: NDArray[np.int64], draw: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one per position; `draw` numbers the draws of a position."""
    bits = hash64(seed, epoch, purpose, position.astype(np.uint64), draw)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_text(text: str) -> int:
    """64 bits of the BLAKE2b hash of a text; not the hash of `hash64`."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
