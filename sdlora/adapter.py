"""The contract of an adapter kind, and how adapters are put on a frozen model, routed, and taken off again.

A `Bank` holds any number of adapters over one base. Every adapted layer becomes a `Site`: the frozen layer and, for each adapter that
sits on it, a `Delta`. Which adapter acts on which sample of a batch, and how strongly, is the bank's `Route`, set before a forward.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sdlora.errors import UserError
from sdlora.layers import applied, readers
from sdlora.quantise import Quantised
from sdlora.routing import Route, Routing, wide
from sdlora.settings import Settings


class Block(Settings):
    """Settings of some of the layers."""

    match: Annotated[str, Field(min_length=1)]
    """Preset or pattern; where several tables match a layer, the last that says something counts."""
    lr_factor: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Factor on the learning rate of these layers; 0: they are not adapted."""


class Targeted(Settings):
    """What the settings of every kind have; a kind names itself in `kind`."""

    kind: str
    targets: list[str] | None = None
    """Layers to adapt: names of presets and patterns over layer names (`unet.*attn2.to_k`)."""
    blocks: list[Block] = Field(default=[])
    """What is otherwise for some of them, a table `[[adapter.blocks]]` for each."""

    def at(self, said: Sequence[Block]) -> Self:
        """The settings of a layer that these blocks match, in their order."""
        return self

    def spelt(self, ids: Sequence[int]) -> Self:
        """The settings of a layer that reads the trigger as these tokens."""
        return self

    @classmethod
    def blank(cls) -> Self:
        """Settings for weights that are read from a pack and bring all their own."""
        return cls()  # type: ignore[call-arg]


Piece = tuple[ModuleType, Settings]
"""What sits on one layer: a kind, and that kind's settings there."""


class Delta(nn.Module):
    """What one adapter changes at one layer; a kind subclasses it as `Adapter`.

    Constructed as `Adapter(layer, config, rng)`, where `rng` gives all random numbers of its start.
    """

    start: ClassVar[Literal["exact", "rounding", "gated"]] = "exact"
    """Whether the adapted layer starts as the layer itself: bit for bit, up to rounding, or through a gate at zero."""
    merges: ClassVar[bool] = True
    """Whether `merged` gives a ΔW that does the same as the adapter."""
    leaves: ClassVar[frozenset[str]] = frozenset()
    """All leaf names that it may have in a pack; the leaves of a pack that says no kind tell it."""
    exact: ClassVar[frozenset[str]] = frozenset({"alpha"})
    """Leaves whose values a pack holds in float32."""
    network: ClassVar[str] = "lycoris.kohya"
    """The module by which trainers of packs know the kind."""
    shared: ClassVar[bool] = False
    """Whether all layers of an adapter hold the same parameters, those of the first."""
    fast: ClassVar[Sequence[str]] = ()
    """Its parameters that may learn faster than the others (LoRA+): those that start at zero, where the kind is such a product."""

    def difference(self, layer: nn.Module) -> Tensor:
        """ΔW in the shape of the layer's weight, differentiable. Whoever merges gives it; the rest follows."""
        raise NotImplementedError

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What is added, at strength 1, to the layer's own output `y` for its input `x`; overridden where it can be had cheaper."""
        return applied(layer, x, self.difference(layer))

    def dropped(self, layer: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """`change` in training, where a kind may leave parts of itself out, by random numbers that each sample's key (B,) settles."""
        return self.change(layer, x, y)

    def at_once(self, layer: nn.Module, x: Tensor, slot: int, routing: "Routing") -> Tensor | None:
        """The layer's output with the change of this adapter alone, where both can be had in fewer operations together; else None."""
        return None

    def merged(self, layer: nn.Module) -> Tensor | None:
        """ΔW as `change` has it at once, float32; None if the kind has none."""
        return self.difference(layer).detach().float() if self.merges else None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of this layer in a pack, by the leaf names that readers of packs know."""
        raise NotImplementedError

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave; raises `ValueError` or `KeyError` when the names or shapes don't fit."""
        raise NotImplementedError

    def known(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` for leaves that are none of this kind's."""
        unknown = set(tensors) - self.leaves
        if unknown:
            raise ValueError(f"holds {', '.join(sorted(unknown))}, which this kind of adapter does not have")

    def take(self, name: str, tensor: Tensor, *shapes: Sequence[int]) -> None:
        """Make `tensor` the parameter `name`; raises `ValueError` unless it has one of the shapes."""
        if tuple(tensor.shape) not in [tuple(shape) for shape in shapes]:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)} where {' or '.join(str(tuple(shape)) for shape in shapes)} fits")
        device = next(self.parameters()).device
        self.register_parameter(name, nn.Parameter(tensor.to(device, torch.float32)))

    @classmethod
    def mixed(cls, deltas: "Sequence[tuple[int, Delta]]", layer: nn.Module, x: Tensor, y: Tensor, out: Tensor, route: "Route") -> Tensor:
        """`out`, the layer's own output `y` with what others added, under several adapters, given as (slot, delta).

        A kind with a faster way overrides this loop.
        """
        if route.slots is None:
            for slot, delta in deltas:
                out = out + wide(route.strength[..., slot].reshape(-1), y) * delta.change_with_dropout(layer, x, y, route.keys)
            return out
        by_slot, parts = dict(deltas), list[Tensor]()
        for slot, rows in route.blocks:
            part = out[rows]
            if slot in by_slot:  # else the samples keep the layer's output: their adapter does not sit here
                keys = None if route.keys is None else route.keys[rows]
                part = part + wide(route.strength_of(rows), y) * by_slot[slot].change_with_dropout(layer, x[rows], y[rows], keys)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def change_with_dropout(self, layer: nn.Module, x: Tensor, y: Tensor, keys: Tensor | None) -> Tensor:
        """`change`, or in training, which has keys, `dropped`; in the dtype of the output."""
        change = self.change(layer, x, y) if keys is None else self.dropped(layer, x, y, keys)
        return change.to(y.dtype)


class Site(nn.Module):
    """A frozen layer with the deltas that sit on it; without a route it is the layer, bit for bit."""

    def __init__(self, layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.layer = layer
        self.deltas = nn.ModuleDict()  # by adapter name
        self._routing = routing

    @property
    def weight(self) -> Any:
        return self.layer.weight

    @property
    def bias(self) -> Any:
        return self.layer.bias

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """`x` (B, ...) is what the layer works on; what else it is given (the text, to an attention) is no adapter's concern."""
        routing = self._routing
        acting = list(self._acting(routing))
        if len(acting) == 1 and not rest and not named:
            ((slot, delta),) = acting
            together = delta.at_once(self.layer, x, slot, routing)
            if together is not None:
                return together
        y: Tensor = self.layer(x, *rest, **named)
        by_kind: dict[type[Delta], list[tuple[int, Delta]]] = {}
        for slot, delta in acting:
            by_kind.setdefault(type(delta), []).append((slot, delta))
        out = y
        for kind, deltas in by_kind.items():
            assert routing.route is not None
            out = kind.mixed(deltas, self.layer, x, y, out, routing.route)
        return out

    def _acting(self, routing: Routing) -> Iterator[tuple[int, Delta]]:
        """(slot, delta) of those here that the bank's route lets act."""
        if routing.route is None:
            return
        active = routing.route.active
        for slot in range(len(routing.adapters)) if active is None else active:
            name = routing.adapters[slot]
            if name in self.deltas:
                delta = self.deltas[name]
                assert isinstance(delta, Delta)
                yield slot, delta


@dataclass
class Bank:
    """The adapters over one base. `layers` finds a frozen layer by its full dotted name, `unet.` or `text_encoder.` first."""

    components: Mapping[str, nn.Module]
    routing: Routing = field(default_factory=Routing)
    sites: dict[str, Site] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)  # the base's weights that something was merged into, as they were

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters; the slot of each is its place."""
        return self.routing.adapters

    @property
    def route(self) -> Route | None:
        """Which adapters act now; None: the base alone."""
        return self.routing.route

    @route.setter
    def route(self, route: Route | None) -> None:
        self.routing.route = route

    def add(self, name: str, pieces: Mapping[str, Piece], rng: Any) -> None:
        """Put a new adapter on, a piece on each of the named layers; `rng(layer name)` gives the random stream of each."""
        if name in self.adapters:
            raise UserError("E-ADAPT-02", f'there is already an adapter called "{name}" on this base')
        for dotted, (kind, config) in pieces.items():
            site = self.sites.get(dotted) or self._adapt(dotted)
            site.deltas[name] = kind.Adapter(site.layer, config, rng(dotted))
        self.adapters.append(name)
        firsts: dict[type[Delta], Delta] = {}
        for _, _, delta in self.deltas(name):
            first = firsts.setdefault(type(delta), delta)
            for leaf, parameter in list(first.named_parameters()) if delta.shared else []:
                delta.register_parameter(leaf, parameter)
        self._group()

    def remove(self, name: str) -> None:
        """Take an adapter off; layers that carry none any more are the base's own again."""
        self.adapters.remove(name)
        self.route = None
        for dotted, site in list(self.sites.items()):
            if name in site.deltas:
                del site.deltas[name]
            if not site.deltas:
                self._replace(dotted, site.layer)
                del self.sites[dotted]
        self._group()

    def eject(self) -> None:
        """Take every adapter off."""
        for name in list(self.adapters):
            self.remove(name)

    def use(self, strengths: Mapping[str, float | Tensor] | None) -> None:
        """Let the named adapters act on every sample at a strength, a number or one per sample (B,); None or all zero: the base.

        Strengths are looked at, and so belong on the CPU; they go to where the layers are in one copy.
        """
        chosen = {name: torch.as_tensor(value, dtype=torch.float32, device="cpu") for name, value in (strengths or {}).items()}
        if not any(bool(value.any()) for value in chosen.values()):
            self.route = None
            return
        rows = max((value.numel() for value in chosen.values()), default=1)
        columns = [chosen.get(name, torch.zeros(())).expand(rows) for name in self.adapters]
        active = tuple(slot for slot, name in enumerate(self.adapters) if name in chosen and bool(chosen[name].any()))
        devices = (parameter.device for component in self.components.values() for parameter in component.parameters())
        self.route = Route(torch.stack(columns, 1).to(next(devices, "cpu")), None, active)

    def deltas(self, name: str) -> Iterator[tuple[str, nn.Module, Delta]]:
        """(full layer name, layer, delta) of one adapter."""
        for dotted, site in self.sites.items():
            if name in site.deltas:
                delta = site.deltas[name]
                assert isinstance(delta, Delta)
                yield dotted, site.layer, delta

    def parameters(self, name: str, component: str = "") -> dict[str, nn.Parameter]:
        """The parameters of one adapter (in one component), by full name; those that layers share once, by the first layer's name."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for dotted, _, delta in self.deltas(name):
            for leaf, parameter in delta.named_parameters():
                found.setdefault(id(parameter), (f"{dotted}.{leaf}", parameter))
        return {full: parameter for full, parameter in found.values() if full.startswith(component)}

    def fast(self, name: str) -> set[str]:
        """Full names of the parameters of one adapter that may learn faster than the others."""
        return {f"{dotted}.{leaf}" for dotted, _, delta in self.deltas(name) for leaf in delta.fast}

    def merge(self, name: str, strength: float = 1.0) -> None:
        """Add ΔW into the base's weights, so that inference costs nothing; the adapter is taken off. `unmerge` undoes it."""
        packed = next((dotted for dotted, layer, _ in self.deltas(name) if isinstance(layer, Quantised)), None)
        if packed:
            what = "nothing can be merged into weights of fewer bits: rounding would lose most of it"
            raise UserError("E-QUANT-02", what, packed, "load the base in full precision")
        with torch.no_grad():
            for dotted, layer, delta in self.deltas(name):
                change = delta.merged(layer)
                if change is None:
                    self.unmerge()
                    raise UserError("E-ADAPT-03", "this kind of adapter cannot be merged into the base", dotted)
                weight: Tensor = layer.weight  # type: ignore[assignment]
                self.before.setdefault(dotted, weight.clone())
                weight.copy_(weight.float() + strength * change)
        self.remove(name)

    def unmerge(self) -> None:
        """Give the base its own weights back, bit for bit, whatever was merged into them."""
        layers = frozen_layers(self.components)
        with torch.no_grad():
            for dotted, weight in self.before.items():
                layers[dotted].get_parameter("weight").copy_(weight)
        self.before.clear()

    def _group(self) -> None:
        """Let the sites know which of their layers read the same."""
        alone = {site.layer: site.deltas for site in self.sites.values() if next(site.layer.children(), None) is None}
        groups = []
        for module, names in itertools.chain.from_iterable(map(readers, self.components.values())):
            same = [layer for layer in (frozen(module.get_submodule(one)) for one in names) if layer in alone]
            groups += [[(layer, alone.pop(layer)) for layer in same]] if same else []
        self.routing.groups = [*groups, *([one] for one in alone.items())]

    def _adapt(self, dotted: str) -> Site:
        layer = getattr(self._parent(dotted), dotted.rpartition(".")[2])
        site = Site(layer, self.routing)
        self._replace(dotted, site)
        self.sites[dotted] = site
        return site

    def _replace(self, dotted: str, module: nn.Module) -> None:
        setattr(self._parent(dotted), dotted.rpartition(".")[2], module)

    def _parent(self, dotted: str) -> nn.Module:
        component, *path = dotted.split(".")
        module = self.components[component]
        for part in path[:-1]:
            module = frozen(getattr(module, part))
        return module


def frozen(module: nn.Module) -> nn.Module:
    """The base's own layer, whether or not adapters sit on it."""
    return module.layer if isinstance(module, Site) else module


def frozen_layers(components: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every layer of a base by its full name, component first, whether or not adapters sit on it."""
    return {name: layer for component, module in components.items() for name, layer in _frozen_layers(component, module)}


def _frozen_layers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A function of its own: one that called itself from within another would hold all layers until Python's collector ran."""
    layer = frozen(module)
    yield name, layer
    for child, inner in layer.named_children():
        yield from _frozen_layers(f"{name}.{child}", inner)
