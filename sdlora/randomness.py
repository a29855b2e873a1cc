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


def normal(shape: tuple[int, ...], seed: int, purpose: str, *index: int) -> Tensor:
    """Standard normal noise of the given shape, float32, on the CPU."""
    return torch.from_numpy(stream(seed, purpose, *index).standard_normal(shape, dtype=np.float32))
