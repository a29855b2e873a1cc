"""The only exception that is shown without a traceback, and the exit codes of the program."""

BAD_INPUT, RESOURCES, NUMBERS, OUR_BUG = 2, 3, 4, 5


def writable(text: str) -> str:
    """Text that UTF-8 can hold: of a file's name that is none, the bytes are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


class UserError(Exception):
    """Something in the user's files, settings or hardware that the user can put right.

    `code` names the kind of error for good (`E-DATA-01`), `what` says what is wrong and why it matters, `where` names the file, setting
    or step, `todo` says what to do about it.
    """

    def __init__(self, code: str, what: str, where: object = "", todo: str = "", exit_code: int = BAD_INPUT) -> None:
        super().__init__(writable(" · ".join(part for part in (code, what, str(where), todo) if part)))
        self.code, self.exit_code = code, exit_code


def check_path(path: object) -> None:
    """Raise `UserError` for a path that cannot be written down as text: a page, a settings file or a command line could not name it."""
    if writable(str(path)) != str(path):
        raise UserError("E-DISK-03", "this name is no UTF-8, and cannot be written down", path, "give it another name")
