"""A mapping that keeps what was used last."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass
class Recent(Generic[Value]):
    """At most `most` values; the one unused for longest goes first, and `drop` is told of it."""

    most: int
    drop: Callable[[Value], None] = lambda _: None
    kept: OrderedDict[Hashable, Value] = field(default_factory=OrderedDict)

    def get(self, key: Hashable) -> Value | None:
        if key not in self.kept:
            return None
        self.kept.move_to_end(key)
        return self.kept[key]

    def put(self, key: Hashable, value: Value) -> None:
        self.kept[key] = value
        self.kept.move_to_end(key)
        while len(self.kept) > self.most:
            self.drop(self.kept.popitem(last=False)[1])
