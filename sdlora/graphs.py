"""Passes through the network as CUDA graphs: all that the host asks of the device is recorded once for each shape, and then repeated as a
whole, so that steps that are short on the device do not wait for Python."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.config import Train
from sdlora.devices import is_out_of_memory
from sdlora.errors import UserError

Inputs = Mapping[str, Tensor]
Pass = Callable[[Inputs], tuple[Tensor, Tensor]]
"""From all that changes between passes, on the device, to the losses (B,) and what is to be differentiated (); it must not wait for it."""
MOST = 16
"""Graphs that are kept; passes of further shapes go without."""
WARM = 2
"""Passes before a recording, in which libraries choose their algorithms and take their workspaces."""
SETTING = "train.cuda_graphs"


def check(train: Train, device: torch.device, members: int) -> None:
    """Raise `UserError` where steps cannot be recorded."""
    why = ""
    if device.type != "cuda":
        why = f"CUDA graphs need a CUDA GPU, and this run is on {device.type}"
    elif members > 1:
        why = "a cast's steps have other members each, and are not recorded"
    elif train.compile or train.gradient_checkpointing == "on":
        why = f"{'what is compiled' if train.compile else 'what is computed again in the backward pass'} is not recorded"
    if why:
        raise UserError("E-CONF-15", why, SETTING, "set it to false")


@dataclass
class Graphs:
    """Adds up gradients of passes, repeating those of a kind that it has met. Whatever is not among the inputs stays as it was recorded."""

    params: Sequence[nn.Parameter]
    known: dict[Any, "Recorded"] = field(default_factory=dict)
    moved: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.sum, self.parts = flat(self.params)
        self.pool = torch.cuda.graph_pool_handle() if self.sum.is_cuda else None

    def begin(self) -> None:
        """A step begins: no gradient yet."""
        self.sum.zero_()
        self.moved.clear()

    def take(self, kind: object, inputs: Inputs, run: Pass) -> Tensor:
        """The losses (B,) of a pass. `kind` is all that its course depends on beside the inputs' shapes and which parameters learn."""
        shapes = tuple((name, one.shape, one.dtype) for name, one in inputs.items())
        key = kind, shapes, tuple(one.requires_grad for one in self.params)
        if key not in self.known and len(self.known) >= MOST:
            losses, gradients = differentiated(run, {name: one.to(self.sum.device) for name, one in inputs.items()}, self.params)
            torch._foreach_add_([self.parts[i] for i in gradients], [*gradients.values()])
            self.moved |= gradients.keys()
            return losses
        if key not in self.known:
            self.known[key] = self._recorded(inputs, run)
        found = self.known[key]
        found.repeat(inputs)
        self.sum.add_(found.sum)
        self.moved |= found.moved
        return found.losses

    def end(self) -> None:
        """Leave the sums on the parameters."""
        for i in self.moved:
            self.params[i].grad = self.parts[i]

    def forget(self) -> None:
        """Give back what the recordings hold."""
        self.known.clear()

    def _recorded(self, inputs: Inputs, run: Pass) -> "Recorded":
        try:
            return Recorded(inputs, run, self.params, self.pool)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            what = f"this run's steps cannot be recorded: {str(error).splitlines()[0]}"
            raise UserError("E-CONF-16", what, SETTING, "set it to false") from error


class Recorded:
    """One pass and its gradients, at fixed places of memory."""

    def __init__(self, inputs: Inputs, run: Pass, params: Sequence[nn.Parameter], pool: Any) -> None:
        self.sum, self.parts = flat(params)
        device = self.sum.device
        self.inputs = {name: one.to(device, copy=True) for name, one in inputs.items()}
        self.losses = torch.zeros(len(next(iter(inputs.values()))), dtype=self.sum.dtype, device=device)
        self.run, self.params, self.moved = run, params, set[int]()
        self.graph = self._record(pool) if device.type == "cuda" else None

    def repeat(self, inputs: Inputs) -> None:
        """The same with other inputs; `losses` and `sum` say what came of it until the next time."""
        for name, one in inputs.items():
            self.inputs[name].copy_(one)
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()

    def _record(self, pool: Any) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # samples are drawn ahead on another thread
            self._compute()
        return graph

    def _compute(self) -> None:
        losses, gradients = differentiated(self.run, self.inputs, self.params)
        self.losses.copy_(losses)
        self.moved = set(gradients)
        torch._foreach_copy_([self.parts[i] for i in gradients], [*gradients.values()])


def differentiated(run: Pass, inputs: Inputs, params: Sequence[nn.Parameter]) -> tuple[Tensor, dict[int, Tensor]]:
    """The losses of a pass, and the gradients of those parameters that it reaches, by their place."""
    losses, total = run(inputs)
    learning = [i for i, one in enumerate(params) if one.requires_grad]
    found = torch.autograd.grad(total, [params[i] for i in learning], allow_unused=True)
    return losses.detach(), {i: one for i, one in zip(learning, found, strict=True) if one is not None}


def flat(params: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Zeros for all parameters in a row, and each one's part of them in its own shape."""
    sizes = [one.numel() for one in params]
    whole = torch.zeros(sum(sizes), dtype=params[0].dtype, device=params[0].device)
    return whole, [part.view_as(one) for part, one in zip(torch.split(whole, sizes), params, strict=True)]
