"""The only exception that is shown without a traceback, and the exit codes of the program."""

BAD_INPUT, RESOURCES, NUMBERS, OUR_BUG = 2, 3, 4, 5


class UserError(Exception):
    """Something in the user's files, settings or hardware that the user can put right.

    `code` names the kind of error for good (`E-DATA-01`), `what` says what is wrong and why it matters, `where` names the file, setting
    or step, `todo` says what to do about it.
    """

    def __init__(self, code: str, what: str, where: object = "", todo: str = "", exit_code: int = BAD_INPUT) -> None:
        super().__init__(" · ".join(part for part in (code, what, str(where), todo) if part))
        self.code, self.exit_code = code, exit_code
