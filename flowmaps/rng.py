"""Random streams keyed by purpose, so that no draw depends on the draws before it.

A run that is resumed, or split over processes, then sees the same noise (docs/maths.md, "Randomness").
"""

import hashlib

import torch


def generator(
    seed: int, purpose: str, index: int, part: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator whose state depends on (seed, purpose, index, part) alone.

    Torch's CPU engine keeps only 32 bits of its seed, so a plain hash of all four would collide within about 10^5
    indices. Adding ``index`` to a hash of the other three keeps the indices of a stream distinct.
    """
    base = hashlib.blake2b(f"{seed}/{purpose}/{part}".encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed((int.from_bytes(base) + index) % 2**32)
