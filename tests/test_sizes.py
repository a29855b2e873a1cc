"""The true models' size and cost, counted on tensors without memory: what a change of ours, or of diffusers, would do to every step."""

import bases
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

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
