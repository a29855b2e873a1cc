"""The true models' size, cost and memory, counted on tensors without memory: what a change, ours or of diffusers, would do to each step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bases
import pytest
import small
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sdlora import estimate, learners, lookup, plan
from sdlora.fused import spare

TFLOP = 1e12
XL = "Stable Diffusion XL, 1024 px, 77 tokens"
SIZES = {  # parameters; TFLOP of one sample forward, and with the gradients of all weights, a multiplication and an addition being 2
    "Stable Diffusion 1.5, 512 px, 77 tokens": ({"cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964, 0.803, 2.407),
    XL: (bases.TRUE_SDXL, 2_567_463_684, 6.761, 20.23),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == XL)) for name in SIZES])
def test_the_true_network_costs_what_was_counted(name: str) -> None:
    config, parameters, forward, both = SIZES[name]
    side = 128 if name == XL else 64
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        x, t = torch.empty(1, 4, side, side), torch.empty(1)
        states = torch.empty(1, 77, unet.config.cross_attention_dim)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)} if name == XL else None
    assert sum(p.numel() for p in unet.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        said = unet(x, t, states, added_cond_kwargs=added).sample
        assert counter.get_total_flops() / TFLOP == pytest.approx(forward, rel=2e-3)
        said.sum().backward()
    assert counter.get_total_flops() / TFLOP == pytest.approx(both, rel=2e-3)


GIB = 2**30
MOST = {  # GiB that a plan counts at most, batch 1, rank 16, blocks computed again; by how the weights are held
    ("sd1", 512, "attention"): {"full": 2.3},
    ("sd1", 512, "all-linear"): {"full": 2.3},
    ("sdxl", 1024, "attention"): {"full": 6.5, "8bit": 4.4, "nf4": 3.5},
    ("sdxl", 1024, "all-linear"): {"full": 6.5, "8bit": 4.44, "nf4": 3.5},  # the aim with 8 bits is 4.4, too
}


def without_memory(name: str) -> Any:
    """The true network of a family, bf16, on the meta device; of its text encoders there is only what the network is told."""
    config, rows = (bases.TRUE_SDXL, 78) if name == "sdxl" else ({"cross_attention_dim": 768, "attention_head_dim": 8}, 77)
    true = getattr(lookup.find("families", name), name.upper())

    class Sized(true):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.device = torch.device("meta")
            with self.device:
                self.unet = UNet2DConditionModel(**config).to(torch.bfloat16).requires_grad_(False)
            spare(self.unet)
            self.components = {"unet": self.unet}
            self.tokenizers: list[Any] = []
            self.latent_channels, self.latent_factor, self.step_px = 4, 8, 8 * 2 ** (len(self.unet.config.block_out_channels) - 1)
            self.text_encoder_2 = SimpleNamespace(config=SimpleNamespace(projection_dim=1280))

        def tokens(self, captions: Any) -> Any:
            return captions

        def states(self, tokens: Any) -> Tensor:
            return torch.empty(len(tokens), rows, config["cross_attention_dim"], device="meta", dtype=torch.bfloat16)

    return Sized()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "targets"), MOST)
def test_the_true_network_is_counted_to_fit(name: str, side: int, targets: str, base: Path) -> None:
    family = without_memory(name)
    run = small.settled(base, base, adapter__rank=16, adapter__targets=[targets], train__batch_size=1, train__precision="bf16",
                        train__text_encoder_lr=0.0)  # fmt: skip
    measured = estimate.memory(run, family, learners.pieces(run, family), [(side, side)])
    for weights, most in MOST[name, side, targets].items():
        found = plan.Plan(weights, True, 0, measured.parts(weights, True), None)
        assert most / 2 < found.peak / GIB <= most, weights
        assert found.peak + 2 * measured.checkpointed < plan.Plan(weights, False, 0, measured.parts(weights), None).peak, "the control"
