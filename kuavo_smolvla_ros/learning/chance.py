"""Chance as a function: numbers that depend on what they are for, never on what was drawn before.

Own integer hashing rather than a library's generators: the order of training must not change with a version
of numpy, or a run could not be continued after an upgrade.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def key_of(*parts: Any) -> int:
    """64 bits that stand for these parts (texts and whole numbers)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def mixed(values: Words) -> Words:
    """Each word scrambled (the finaliser of splitmix64): equal in, equal out, and no visible order."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def words(key: int, numbers: Any) -> Words:
    """A scrambled word for each number under a key."""
    return mixed(np.asarray(numbers).astype(np.uint64) ^ mixed(np.uint64(key)))


def uniform(key: int, numbers: Any) -> NDArray[np.float64]:
    """A number in 0..1 for each number under a key."""
    return (words(key, numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: int, length: int) -> NDArray[np.int64]:
    """The numbers below `length` in an order that belongs to the key."""
    return np.argsort(words(key, np.arange(length, dtype=np.uint64)), kind="stable").astype(np.int64)
