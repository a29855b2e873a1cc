"""Prefix tuning (Li & Liang 2021, section 4.2) of cross-attention, behind a gate (Zhang et al. 2023, LLaMA-Adapter, section 3.2).

y + gate · out(attention(q, keys, values)): learnt tokens that every query sees beside the text, in an attention of their own, as
IP-Adapter (Ye et al. 2023, eq. 5) has it, so that with the gate at zero, as at the start, the layer is the base's.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from pydantic import Field
from torch import Tensor, nn

from sdlora.adapter import Delta, Targeted, frozen

LEAVES = {"keys": "prefix_k", "values": "prefix_v", "gate": "prefix_gate"}


class Config(Targeted):
    kind: Literal["prefix"] = "prefix"
    """Learnt tokens beside the text, whatever the prompt says; it cannot be merged."""
    tokens: Annotated[int, Field(ge=1, le=1024)] = 8
    """Learnt tokens in each layer."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return isinstance(layer, Attention)


class Adapter(Delta):
    """keys and values (n, inner), gate (1,), float32. Query and output are the frozen layers', without what other adapters add to them."""

    start = "gated"
    merges = False
    leaves = frozenset(LEAVES.values())
    exact = frozenset({"prefix_gate"})
    network = "sdlora.adapters.prefix"
    fast = ("gate",)

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Attention, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        query = frozen(layer.to_q)
        device = query.get_parameter("weight").device
        for name in ("keys", "values"):
            values = rng.standard_normal((config.tokens, int(query.out_features)), dtype=np.float32)  # type: ignore[arg-type]
            self.register_parameter(name, nn.Parameter(torch.from_numpy(values).to(device)))
        self.gate = nn.Parameter(torch.zeros(1, device=device))

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(layer, Attention)
        keys, values = (self.split(p.to(x.dtype)[None].expand(len(x), -1, -1), layer.heads) for p in (self.keys, self.values))
        seen = F.scaled_dot_product_attention(self.split(frozen(layer.to_q)(x), layer.heads), keys, values, scale=layer.scale)
        out: Tensor = frozen(layer.to_out[0])(seen.transpose(1, 2).flatten(2))
        return self.gate.to(x.dtype) * out / float(layer.rescale_output_factor)

    @staticmethod
    def split(x: Tensor, heads: int) -> Tensor:
        """(B, N, heads · d) -> (B, heads, N, d)."""
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    def tensors(self) -> dict[str, Tensor]:
        return {leaf: getattr(self, name) for name, leaf in LEAVES.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)
        count, inner = len(tensors["prefix_k"]) if tensors["prefix_k"].ndim else 0, self.keys.shape[1]
        if not count:
            raise ValueError("holds no token")
        for name, leaf in LEAVES.items():
            self.take(name, tensors[leaf], [1] if name == "gate" else [count, inner])
