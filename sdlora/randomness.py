"""Every random number is a pure function of (seed, purpose, index), so a run has no generator state to save.

The stream is Philox-4x64 (Salmon et al. 2011) under a 128-bit key. `torch.Generator.manual_seed` would not do: on the CPU it keeps
only the low 32 bits of a seed, and hashing (seed, step) into so few makes two steps share their noise sooner or later.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """The random stream of one purpose ("noise", "order" ...) at one index (sample, step, epoch ...)."""
    name = "/".join([str(seed), purpose, *map(str, index)])
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def uniform(keys: Tensor, salt: int, count: int) -> Tensor:
    """(B, count) numbers in [0, 1), float32, each row a function of its key (B,) int64 and the salt, on any device the same.

    SplitMix64 (Steele et al. 2014, figure 14), whose additions and products int64 does modulo 2^64 as well; it costs no copy to a device.
    """

    def shifted(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts its sign in

    def mixed(z: Tensor) -> Tensor:
        z = (z ^ shifted(z, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        z = (z ^ shifted(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        return z ^ shifted(z, 31)

    places = torch.arange(1, count + 1, device=keys.device) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    return shifted(mixed(mixed(keys + salt)[:, None] + places), 40).float() / 2**24


def normal(shape: tuple[int, ...], seed: int, purpose: str, *index: int) -> Tensor:
    """Standard normal noise of the given shape, float32, on the CPU."""
    return torch.from_numpy(stream(seed, purpose, *index).standard_normal(shape, dtype=np.float32))
