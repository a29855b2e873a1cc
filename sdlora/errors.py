"""The only exception that is shown without a traceback, and the exit codes of the program."""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
BAD_INPUT, RESOURCES, NUMBERS, OUR_BUG = 2, 3, 4, 5


def escape_surrogates(text: str) -> str:
    """Text that UTF-8 can hold: of a file's name that is none, the bytes are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


class UserError(Exception):
    """Something in the user's files, settings or hardware that the user can put right.

    `code` names the kind of error for good (`E-DATA-01`), `what` says what is wrong and why it matters, `where` names the file, setting
    or step, `todo` says what to do about it.
    """

    def __init__(self, code: str, what: str, where: object = "", todo: str = "", exit_code: int = BAD_INPUT) -> None:
        super().__init__(escape_surrogates(" · ".join(part for part in (code, what, str(where), todo) if part)))
        self.code, self.exit_code = code, exit_code


def check_path(path: object) -> None:
    """Raise `UserError` for a path that cannot be written down as text: a page, a settings file or a command line could not name it."""
    if escape_surrogates(str(path)) != str(path):
        raise UserError("E-DISK-04", "this name is no UTF-8, and cannot be written down", path, "give it another name")


def without_frames(events: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """A generator whose `UserError`s, interruptions, and what they came of, hold no function's variables: whoever keeps an error, as a
    notebook does, would keep a base with it. (`traceback.clear_frames` leaves those of closures.)"""

    @functools.wraps(events)
    def told(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        callers = sys.exception()  # what the caller is handling is not ours to touch
        try:
            yield from events(*args, **kwargs)
        except (UserError, KeyboardInterrupt) as error:
            one: BaseException | None = error
            while one is not None and one is not callers and one.__traceback__:
                one.__traceback__ = None
                one = one.__cause__ or one.__context__
            raise error

    return told
