"""Who may use a page that others on the network can reach: one password, sessions in memory, and no endless guessing."""

import hashlib
import hmac
import os
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from sdlora.api import UserError

COOKIE = "sdlora-session"
VARIABLE = "SDLORA_PASSWORD"
LASTS_S = 12 * 3600
MOST_FAILURES, WITHIN_S = 10, 60.0
SHORTEST = 8
MOST_SESSIONS = 1000
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>sdlora: log in</title><link rel="stylesheet" href="/page.css"></head><body class="plain"><main><h1>sdlora</h1>
<form method="post" action="/login"><label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required autofocus>
<button type="submit">Log in</button><p role="alert">{note}</p></form></main></body></html>"""


@dataclass
class Login:
    """One password for all; what is kept of it is a hash."""

    key: bytes
    sessions: dict[str, float] = field(default_factory=dict)  # until when each holds
    failures: deque[float] = field(default_factory=deque)

    @classmethod
    def with_password(cls, password: str) -> "Login":
        return cls(_digest(password))

    def knows(self, cookies: str) -> bool:
        """Whether a Cookie header holds a session that is still good."""
        try:
            said = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return False
        return said is not None and self.sessions.get(said.value, 0.0) > time.time()

    def enter(self, password: str) -> tuple[int, str]:
        """(303, a new session), (403, "") for a wrong password, or (429, "") after too many of them, from whomever they came."""
        now = time.monotonic()
        while self.failures and now - self.failures[0] > WITHIN_S:
            self.failures.popleft()
        if len(self.failures) >= MOST_FAILURES:
            return 429, ""
        if not hmac.compare_digest(_digest(password), self.key):
            self.failures.append(now)
            return 403, ""
        self.sessions = {one: until for one, until in [*self.sessions.items()][-MOST_SESSIONS:] if until > time.time()}
        session = secrets.token_urlsafe(32)
        self.sessions[session] = time.time() + LASTS_S
        return 303, session

    def leave(self, cookies: str) -> None:
        """End the session that a Cookie header names."""
        if self.knows(cookies):
            del self.sessions[SimpleCookie(cookies)[COOKIE].value]


def password_of(file: Path | None) -> tuple[str, bool]:
    """The password from a file or the environment, else a new one; and whether it is new and must be shown. Raises `UserError`."""
    said = os.environ.get(VARIABLE, "")
    if file:
        try:
            said = file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("E-UI-07", f"the password cannot be read: {error}", file, "name a text file with one line") from None
    if not said and not file:
        return secrets.token_urlsafe(12), True
    if len(said) < SHORTEST:
        raise UserError("E-UI-07", f"a password has at least {SHORTEST} characters", file or VARIABLE, "choose a longer one")
    return said, False


def _digest(password: str) -> bytes:
    return hashlib.sha256(password[:1000].encode("utf-8", "replace")).digest()
