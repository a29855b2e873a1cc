"""Latents and a prompt become a picture: one way for previews, command line and web page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sdlora.adapter import Bank
from sdlora.devices import Portion, compute_in_portions
from sdlora.errors import UserError, escape_surrogates
from sdlora.family import Family


@dataclass(frozen=True)
class Recipe:
    """All that one picture depends on, beside the base and the packs."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 4.0
    width: int = 0  # px
    height: int = 0
    scales: tuple[tuple[str, float], ...] = ()  # (adapter, scale); an adapter not named is off
    text_scales: tuple[tuple[str, float], ...] = ()  # those whose scale in the text encoders is another than in the UNet

    def __post_init__(self) -> None:
        if any(escape_surrogates(text) != text for text in (self.prompt, self.negative)):
            raise UserError("E-GEN-08", "a prompt is no text: it is no UTF-8", "--prompt", "type it anew, in a terminal that sends UTF-8")

    def at(self, **changes: object) -> "Recipe":
        """The recipe with something changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def initial_latents(family: Family, recipe: Recipe) -> Tensor:
    """(C, h, w) noise of a seed: torch's CPU generator, so that a seed means the same picture in diffusers."""
    shape = (1, family.latent_channels, recipe.height // family.latent_factor, recipe.width // family.latent_factor)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(recipe.seed))[0]


def render(family: Family, bank: Bank, recipes: Sequence[Recipe], batch: int = 0) -> Tensor:
    """Pictures (N, 3, H, W) in 0..1 of recipes that agree in size, steps and guidance; each may have scales of its own.

    `batch` rows are computed at once (0: all of them), and fewer where memory does not suffice. A row's last bits depend on the batch it is
    computed in, on any hardware: two pictures are comparable bit for bit when their batches have the same shape.
    """
    size = "{0.width}x{0.height}".format(recipes[0])
    draw = partial(render_portion, family, bank, recipes)
    return compute_in_portions(draw, batch or len(recipes), f"picture of {size} px", can_tile=True)


@torch.no_grad()
def render_portion(family: Family, bank: Bank, recipes: Sequence[Recipe], portion: Portion) -> Tensor:
    """As `render`, so much at once and no less; on the CPU."""
    first = recipes[0]
    assert all((r.width, r.height, r.steps, r.guidance) == (first.width, first.height, first.steps, first.guidance) for r in recipes)
    before, starts = bank.route, range(0, len(recipes), portion.rows)
    try:
        return torch.cat([_render(family, bank, recipes[start : start + portion.rows], portion.tiled).cpu() for start in starts])
    finally:
        bank.route = before


def _render(family: Family, bank: Bank, recipes: Sequence[Recipe], tiled: bool) -> Tensor:
    first = recipes[0]
    scheduler = family.new_scheduler()
    scheduler.set_timesteps(first.steps, device=family.device)
    latents = torch.stack([initial_latents(family, recipe) for recipe in recipes]).to(family.device) * scheduler.init_noise_sigma
    guided = first.guidance > 1
    _let(bank, [dict(recipe.scales) | dict(recipe.text_scales) for recipe in recipes])
    states = family.states(family.tokens([recipe.prompt for recipe in recipes]))
    if guided:
        states = torch.cat([family.states(family.tokens([recipe.negative for recipe in recipes])), states])
    _let(bank, [dict(recipe.scales) for recipe in recipes] * (2 if guided else 1))
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, t)
        predicted = family.predict(x, t.expand(len(x)), states).float()
        if guided:
            empty, said = predicted.chunk(2)
            predicted = empty + first.guidance * (said - empty)
        latents = scheduler.step(predicted, t, latents).prev_sample
    return (family.decode(latents, tiled) / 2 + 0.5).clamp(0, 1)


def _let(bank: Bank, rows: Sequence[dict[str, float]]) -> None:
    """Let each row of the batch have its own scale of each adapter."""
    bank.use({name: torch.tensor([row.get(name, 0.0) for row in rows]) for name in bank.adapters})
