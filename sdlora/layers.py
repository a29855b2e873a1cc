"""Frozen layers, as adapters see them: which there are, which a pattern means, what a weight is however it is held."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.errors import UserError
from sdlora.lookup import nearest
from sdlora.quantise import Quantised

PROJECTIONS = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"))
"""Query, key and value of an attention, as diffusers and transformers call them."""


def readers(network: nn.Module) -> Iterator[tuple[nn.Module, Sequence[str]]]:
    """Modules, and those of their layers that read the same tensor: an attention's projections; of cross-attention those of the text."""
    for module in network.modules():
        for names in PROJECTIONS:
            if all(name in module._modules for name in names):
                yield module, names[1:] if vars(module).get("is_cross_attention") else names


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer does no more than multiply by its weight: a linear one, or a convolution of one group."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def weight_of(layer: nn.Module) -> Tensor:
    """A frozen layer's weight; of a packed one, what it stands for."""
    return (layer.whole() if isinstance(layer, Quantised) else layer.get_parameter("weight")).detach()


def shape_of(layer: nn.Module) -> torch.Size:
    """The shape of `weight_of`, at no cost."""
    return layer.shape if isinstance(layer, Quantised) else layer.get_parameter("weight").shape


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """What a frozen layer gives without its bias."""
    return layer.product(x) if isinstance(layer, Quantised) else applied(layer, x, weight_of(layer))


def applied(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer would give with this weight, computed in the input's dtype, and no bias."""
    weight = weight.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
    return F.linear(x, weight)


def choose_sites(
    layers: Iterable[str], targets: Sequence[str], presets: Mapping[str, Sequence[str]], where: str = "adapter.targets"
) -> list[str]:
    """Names of the layers that the targets mean, in the model's order; a target is a preset's name or a pattern (`unet.*.to_k`)."""
    chosen: set[str] = set()
    for target in targets:
        for pattern in presets.get(target, [target]):
            found = {name for name in layers if fnmatchcase(name, pattern)}
            if not found:
                hint = nearest(target, [*presets, *layers])
                raise UserError(
                    "E-ADAPT-01",
                    f'"{target}" matches no layer that this kind of adapter fits{hint}',
                    where,
                    f"presets: {', '.join(presets)}; or a pattern over names such as {next(iter(layers), '')}",
                )
            chosen |= found
    return [name for name in layers if name in chosen]
