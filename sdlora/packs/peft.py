"""What the header of a pack in PEFT's layout says of its scales: such packs hold no alpha."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from sdlora.packs.layouts import DOWN

FIELD = "lora_adapter_metadata"


@dataclass
class Alphas:
    """LoRA settings of each component, by its name."""

    components: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Self:
        """From the header's JSON, whose keys are `unet.lora_alpha` and the like; nothing where there is none."""
        try:
            table = json.loads(metadata.get(FIELD, "{}"))
        except (ValueError, RecursionError):
            return cls()
        found: dict[str, dict[str, Any]] = {}
        for key, value in table.items() if isinstance(table, dict) else ():
            component, _, name = key.partition(".")
            found.setdefault(component, {})[name] = value
        return cls(found)

    def fill(self, layer: str, leaves: dict[str, Tensor]) -> None:
        """Give a layer the alpha that the header says. Raises `ValueError` if that makes no sense."""
        component, _, inner = layer.partition(".")
        said = self.components.get(component)
        if said is None or "alpha" in leaves or DOWN not in leaves or "lora_alpha" not in said:
            return
        alpha, rank = _of(said.get("alpha_pattern"), inner, said["lora_alpha"]), len(leaves[DOWN])
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ValueError(f"its alpha in the header is {alpha!r:.40}")
        leaves["alpha"] = torch.tensor(float(alpha) * (rank**0.5 if said.get("use_rslora") is True else 1.0))


def _of(patterns: Any, inner: str, usual: Any) -> Any:
    """What a table of name endings says of a layer. They are regular expressions to PEFT, and texts here: a file's own are not run."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        ending = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if any(sign in ending for sign in "*+?()[]{}|\\"):
            raise ValueError(f"its alpha in the header is for the expression {pattern!r:.60}")
        if inner == ending or inner.endswith(f".{ending}"):
            return value
    return usual
