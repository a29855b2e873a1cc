"""Whether a base that multiplies in 8-bit integers still says what it says in full: both are asked, and their losses compared."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.randomness import normal

PLACES = (0.1, 0.35, 0.6, 0.85)
"""Shares of the schedule at which it is asked."""
MOST_LOSS, MOST_SAID = 0.01, 0.05
"""Of the loss in full, and of what the network says in full, by which the other may differ."""


@dataclass(frozen=True)
class Word:
    """What a network says at all places, and its mean squared error."""

    said: Tensor
    loss: float


@torch.no_grad()
def asked(family: Family) -> Word:
    """A grey picture of half the base's own side, under noise, with the empty prompt."""
    side = max(1, family.base.size_px // 2 // family.step_px) * family.step_px // family.latent_factor
    states, said, loss = family.states(family.tokens([""])), [], 0.0
    for place in PLACES:
        t = round(place * (len(family.alphas_cumprod) - 1))
        noise = normal((1, family.latent_channels, side, side), t, "parity").to(family.device)
        kept = family.alphas_cumprod[t]
        target = noise * kept.sqrt() if family.prediction == "velocity" else noise
        said.append(family.predict((1 - kept).sqrt() * noise, torch.tensor([t], device=family.device), states).float())
        loss += float((said[-1] - target).square().mean()) / len(PLACES)
    return Word(torch.cat(said), loss)


def lay(family: Family, device: torch.device) -> str:
    """Put a base on a device in 8-bit integers; says how near it is to itself in full. Raises `UserError` where it is not near."""
    family.place(device)
    before = asked(family)
    family.place(device, "int8")
    after = asked(family)
    loss, said = abs(after.loss - before.loss) / before.loss, float((after.said - before.said).norm() / before.said.norm())
    words = f"its loss is {after.loss:.4f} where it is {before.loss:.4f} in full, and what it says is {said:.1%} apart"
    if not (loss <= MOST_LOSS and said <= MOST_SAID):  # nor where it is not a number
        todo = "set train.base_weights to full; or to 8bit, which only holds the weights so"
        most = f"{MOST_LOSS:.0%} and {MOST_SAID:.0%} are let pass"
        raise UserError("E-QUANT-04", f"this base does not bear 8-bit products: {words}; {most}", family.base.name, todo)
    return f"products in 8-bit integers: {words}"
