"""A network's repeated blocks through torch's compiler, adapters and all that they need left as they are."""

import shutil

import torch
from diffusers.models.activations import GEGLU
from torch import nn

from sdlora.adapter import Site
from sdlora.errors import UserError
from sdlora.fused import FACTORS, Gate, One


def check(device: torch.device) -> None:
    """Raise `UserError` where nothing can be compiled."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        what = "torch compiles for a CPU with a C++ compiler, and there is none on this machine"
        raise UserError("E-CONF-14", what, "train.compile", "leave it off, or install one, such as g++")


def compile_blocks(network: nn.Module) -> int:
    """Compile the blocks that diffusers calls repeated, once for all shapes; how many there are. Adapters must be on: they run between the
    compiled pieces as without."""
    for module in network.modules():
        if isinstance(module, Site):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign, no-untyped-call]
        for name in FACTORS:
            if isinstance(vars(module).get(name), One):
                setattr(module, name, 1.0)  # the compiler spares the division itself
        if type(module) is Gate:
            module.__class__ = GEGLU  # and fuses the gate
    kinds = getattr(network, "_repeated_blocks", ())
    blocks = [module for module in network.modules() if type(module).__name__ in kinds]
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)
