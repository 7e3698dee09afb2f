"""Randomness is a function, not a state: every draw is blake2b of what it is for."""

import hashlib
import struct
from collections.abc import Sequence


def draw_key(*parts: int | str) -> bytes:
    """16 bytes that depend on `parts` alone, e.g. (seed, "rollout", step, attempt, env, task index, sample, agent)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(struct.pack("<I", len(text)) + text)  # length-prefixed: ("a", "bc") differs from ("ab", "c")
    return digest.digest()


def uniforms(key: bytes, position: int) -> tuple[float, float]:
    """Two independent uniforms in [0, 1) with 53 bits each, a function of (key, position)."""
    first, second = struct.unpack("<QQ", hashlib.blake2b(struct.pack("<q", position), key=key, digest_size=16).digest())
    return (first >> 11) * 2.0**-53, (second >> 11) * 2.0**-53


def integer(bound: int, *parts: int | str) -> int:
    """An integer in [0, bound), a function of `parts`; its bias is below bound / 2**128."""
    return int.from_bytes(draw_key(*parts), "little") % bound


def permuted(index: int, size: int, *parts: int | str) -> int:
    """The image of `index` under a permutation of range(size) keyed by `parts`, without holding the permutation.

    A four-round Feistel network over the next power of four, walked until it lands inside (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains").
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} outside range({size})")
    return _permuted(index, size, draw_key(*parts))


def shuffled(items: Sequence[int], *parts: int | str) -> list[int]:
    """`items` in an order keyed by `parts`."""
    key = draw_key(*parts)
    return [items[_permuted(position, len(items), key)] for position in range(len(items))]


def _permuted(index: int, size: int, key: bytes) -> int:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round_number in range(4):
            message = struct.pack("<BQ", round_number, right)
            mixed = int.from_bytes(hashlib.blake2b(message, key=key, digest_size=8).digest(), "little")
            left, right = right, left ^ (mixed & low)
        index = (left << half) | right
        if index < size:
            return index
