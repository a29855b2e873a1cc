"""Laws of compiling: what is compiled computes the same; where nothing can be, that is said before anything is done."""

import shutil
from pathlib import Path

import pytest
import small
import torch
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file
from torch import Tensor, nn

from sdlora import api
from sdlora.adapter import Bank
from sdlora.adapters import lora
from sdlora.compiled import compile_blocks
from sdlora.errors import UserError
from sdlora.fused import spare
from sdlora.routing import Route


class Network(nn.Module):
    """One block of the kind that is compiled."""

    _repeated_blocks = ("BasicTransformerBlock",)

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicTransformerBlock(8, 2, 4, cross_attention_dim=6, activation_fn="geglu")

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        said: Tensor = self.block(x, encoder_hidden_states=text)
        return said


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_compiled_blocks_compute_the_same_in_all_shapes() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network().double().requires_grad_(False)
    spare(network)
    bank = Bank({"unet": network})
    places = [f"unet.block.{name}" for name in ("attn1.to_q", "attn1.to_v", "attn2.to_k", "ff.net.0.proj", "ff.net.2")]
    bank.add("a", dict.fromkeys(places, (lora, lora.Config(rank=2, alpha=1.0))), small.stream_of)
    small.randomise(bank, "a")
    for _, _, delta in bank.deltas("a"):
        delta.double()

    def step(tokens: int) -> list[Tensor]:
        bank.route = Route(torch.ones(1, dtype=torch.float64))
        y = network(small.numbers((2, tokens, 8), 1, torch.float64), small.numbers((2, 5, 6), 2, torch.float64))
        return [y, *torch.autograd.grad(y.square().sum(), list(bank.parameters("a").values()))]

    plain = [step(12), step(20)]
    assert compile_blocks(network) == 1
    for before, after in zip(plain, [step(12), step(20)], strict=True):
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "the control: something was compiled"


@pytest.mark.slow
def test_a_run_with_compiled_blocks_is_the_run_without(base: Path, tmp_path: Path) -> None:
    """All but the compiler itself: compiled calls run as they are, bit for bit."""
    folder = small.draw_folder(tmp_path / "pictures", square=True)
    with torch.compiler.set_stance("force_eager"):
        events = list(api.train(small.settled(folder, base, train__compile=True, preview__every=2), tmp_path / "compiled"))
    list(api.train(small.settled(folder, base), tmp_path / "plain"))
    one, other = (load_file(tmp_path / name / "mira.safetensors") for name in ("compiled", "plain"))
    assert {key: value.tolist() for key, value in one.items()} == {key: value.tolist() for key, value in other.items()}
    assert any("4 blocks of the base are compiled" in event.text for event in events)


def test_without_a_compiler_nothing_is_begun(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    folder = small.draw_folder(tmp_path / "pictures", square=True)
    with pytest.raises(UserError, match="E-CONF-14"):
        list(api.train(small.settled(folder, base, train__compile=True), tmp_path / "run"))
    assert not (tmp_path / "run" / "config.toml").exists()
