"""Textual inversion (Gal et al. 2022, section 4) of the trigger: where its tokens stand in a prompt, their embeddings are other ones.

embedding(ids) + v_k at the k-th of the trigger's own tokens, wherever they stand in a row as words of their own. Tokenizers stay as they
are, v starts at zero, and a prompt without the trigger is read as before.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PrivateAttr
from torch import Tensor, nn

from sdlora.adapter import Delta, Targeted


class Config(Targeted):
    kind: Literal["prompt"] = "prompt"
    """What the trigger's own tokens mean to the text encoders, and nothing else; `train.words_lr` is its rate."""
    _ids: tuple[int, ...] = PrivateAttr(())

    def spelt(self, ids: Sequence[int]) -> Self:
        made = self.model_copy()
        made._ids = tuple(ids)
        return made


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer: on embeddings of tokens of which it is known where words end (`family.mark_words`)."""
    return isinstance(layer, nn.Embedding) and hasattr(layer, "ends")


class Adapter(Delta):
    """vectors (n, D), float32, one for each token of the trigger, whose ids (n,) a pack holds beside them."""

    merges = False
    leaves = frozenset({"emb_diff", "emb_ids"})
    exact = leaves
    network = "sdlora.adapters.prompt"
    ids: Tensor
    vectors: Tensor

    def __init__(self, layer: nn.Embedding, config: Config, rng: Any) -> None:
        super().__init__()
        device = layer.get_parameter("weight").device
        self.words = layer.num_embeddings
        self.register_buffer("ids", torch.tensor(config._ids, dtype=torch.long, device=device), persistent=False)
        self.vectors = nn.Parameter(torch.zeros(len(self.ids), layer.embedding_dim, device=device))

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`x` (B, L) are ids. A one-hot product, so that no row but the trigger's is touched by a rounding."""
        count, length = len(self.ids), x.shape[1]
        if not 0 < count <= length:
            return torch.zeros_like(y)
        ends: Tensor = layer.ends  # type: ignore[assignment]
        begins = F.pad(ends[x[:, : length - count]], (1, 0), value=True)  # what stands before ends a word
        found = begins & (x.unfold(1, count, 1) == self.ids).all(-1)
        which = torch.stack([F.pad(found, (k, count - 1 - k)) for k in range(count)], -1)  # (B, L, n)
        return which.to(y.dtype) @ self.vectors.to(y.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"emb_diff": self.vectors, "emb_ids": self.ids.float()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)
        ids = tensors["emb_ids"]
        if ids.ndim != 1 or not len(ids) or bool((ids != ids.round()).any() or (ids < 0).any() or (ids >= self.words).any()):
            raise ValueError(f"emb_ids are no tokens of a text encoder that knows {self.words}")
        self.take("vectors", tensors["emb_diff"], [len(ids), self.vectors.shape[1]])
        self.register_buffer("ids", ids.to(self.vectors.device, torch.long), persistent=False)
