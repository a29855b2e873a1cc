"""What is asked for next, prepared on a thread in the meantime: a function of its key, so the same bytes, only earlier."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """One thread, and one thing prepared ahead; what turns out not to be wanted is thrown away."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._waiting: tuple[Hashable, Future[T]] | None = None

    def take(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was prepared under this key, or else what `make` makes now."""
        waiting, self._waiting = self._waiting, None
        return waiting[1].result() if waiting and waiting[0] == key else make()

    def prepare(self, key: Hashable, make: Callable[[], T]) -> None:
        """Begin with what will be asked for next."""
        self._waiting = key, self._thread.submit(make)
