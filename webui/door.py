"""What stands between the network and the page: who may come in, which routes there are, how much may be brought, what may be taken out.

Everything that is not listed here is refused, whatever the libraries behind it would answer.
"""

import contextlib
import ipaddress
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

from webui.login import Login

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

MB = 2**20
MAX_UPLOAD, MAX_STORED, MAX_FILES, MAX_CALL = 512 * MB, 4096 * MB, 5000, 4 * MB
"""Bytes of one upload, bytes and number of all uploads kept, bytes of any other request."""
KEEP_S = 6 * 3600
"""Age at which an upload that was never taken up, or a picture that was drawn, is cleared away."""
LOCAL = ("127.0.0.1", "localhost", "::1")
PUBLIC = ("/healthz", "/login")
UPLOAD = "/gradio_api/upload"
FILE = "/gradio_api/file="
ROUTES = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/healthz|/login|/logout|/page\.(js|css)|/(assets|static)/.*"
    r"|/(live|shown)/.*|/gradio_api/(info|startup-events|upload|upload_progress|cancel|reset|app_id|heartbeat/.*|queue/.*|call/.*|run/.*"
    r"|api/.*|component_server|file=.*)",
    re.DOTALL,
)
INLINE = "'unsafe-inline'"  # the page library writes styles and scripts of its own into the page
EVAL = "'unsafe-eval'"  # and makes its HTML components by it
POLICY = (
    f"default-src 'self'; script-src 'self' {INLINE} {EVAL}; style-src 'self' {INLINE}; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
SAVED = {"content-type": "application/octet-stream", "content-disposition": "attachment"}
SHOWN = (b"image/png", b"image/jpeg", b"image/webp", b"image/gif")
DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\..*)?", re.IGNORECASE | re.DOTALL)
NO_FILE = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')
"""What Windows takes for a device, and what is in no file's name there: `x.png:y` is another stream of x.png, `x.png.` is x.png itself."""


class TooLargeError(Exception):
    """A body went on beyond what may be sent."""


class Door:
    """The outermost layer of the server. `outputs` holds uploads and what was drawn: only files in it are given out."""

    def __init__(self, app: App, outputs: Path, host: str = LOCAL[0], login: Login | None = None) -> None:
        self.app, self.outputs, self.login = app, Path(os.path.realpath(outputs)), login
        self.hosts = {*LOCAL} if login is None else {*LOCAL, host.lower(), socket.gethostname().lower()}
        self.looked = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no sockets of another kind are served
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.refusal(scope, headers)
        if refusal:
            await _answer(send, *refusal)
            return
        left = self._most(scope["path"])

        async def counted() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise TooLargeError
            return message

        async def sealed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["status"] = 413 if left < 0 else message["status"]  # whatever the application made of the error
                message["headers"] = _sealed(message["headers"], scope["path"].startswith(FILE))
            await send(message)

        with contextlib.suppress(TooLargeError):
            await self.app(scope, counted, sealed)

    def refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and words where a request is refused."""
        path, post = str(scope["path"]), scope["method"] not in ("GET", "HEAD")
        if not self.knows(headers.get("host", "")):
            return 400, "this server is not called so"
        if post and not _is_own(headers):
            return 403, "this request comes from another page"
        if not ROUTES.fullmatch(path):
            return 404, "there is no such page"
        if self.login and path not in PUBLIC and not self.login.knows(headers.get("cookie", "")):
            return (303, "/login") if path == "/" else (401, "log in first")
        if path.startswith(FILE) and not self.gives(scope.get("raw_path") or path.encode()):
            return 403, "no such picture"
        if not post:
            return None
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most(path):
            return 413, "this is more than may be sent at once"
        return (507, "the uploads take all the room they may; try again later") if path == UPLOAD and self._is_full() else None

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server. A page that rebinds its own name to this machine cannot: an address is no name."""
        name = (urlsplit(f"//{host}").hostname or "").lower()
        if name in self.hosts:
            return True
        try:
            return self.login is not None and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def gives(self, raw: bytes) -> bool:
        """Whether the file that a path names lies in the outputs."""
        name = unquote(raw.decode("latin-1").partition("?")[0], errors="replace")
        return name.startswith(FILE) and lies_below(name.removeprefix(FILE), str(self.outputs), os.path)

    def _most(self, path: str) -> int:
        return MAX_UPLOAD if path == UPLOAD else MAX_CALL

    def _is_full(self) -> bool:
        """Whether no more may be brought; what is too old goes first, at most once in a minute."""
        now, sizes = time.time(), list[int]()
        sweep, self.looked = now - self.looked > 60, now if now - self.looked > 60 else self.looked
        for folder, _, names in os.walk(self.outputs):
            for name in names:
                place = os.path.join(folder, name)
                try:
                    status = os.stat(place)
                    if sweep and now - status.st_mtime > KEEP_S:
                        os.unlink(place)
                    else:
                        sizes.append(status.st_size)
                except OSError:
                    continue
        return len(sizes) >= MAX_FILES or sum(sizes) >= MAX_STORED


def lies_below(name: str, folder: str, path: ModuleType) -> bool:
    """Whether a name is that of a file below a folder, which is a real path, wherever links and short names lead; `path` is the system's
    module of paths."""
    drive, rest = path.splitdrive(name)
    parts = re.split(r"[\\/]", rest)
    if "\0" in name or "%" in name or ".." in parts or not path.isabs(name):
        return False
    if path.normcase(drive) != path.normcase(path.splitdrive(folder)[0]):  # before a look: to look at another machine is to log in there
        return False
    if any(NO_FILE.search(part) or DEVICE.fullmatch(part) for part in parts) if path.sep == "\\" else "\\" in name:
        return False
    try:
        real = path.normcase(path.realpath(name))
    except OSError:
        return False
    return bool(real.startswith(path.normcase(path.join(folder, ""))))


def _sealed(headers: list[tuple[bytes, bytes]], is_file: bool) -> list[tuple[bytes, bytes]]:
    """An answer's headers with our own; what is no picture is something to save, and never a page."""
    said = {name.lower(): value for name, value in headers}
    own = HEADERS | ({} if not is_file or said.get(b"content-type", b"") in SHOWN else SAVED)
    kept = [(name, value) for name, value in headers if name.decode("latin-1").lower() not in own]
    return [*kept, *((name.encode(), value.encode()) for name, value in own.items())]


def _is_own(headers: dict[str, str]) -> bool:
    """Whether a request that may change something was made by this server's own page, or by a program."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or (
        urlsplit(origin).netloc.lower() == headers.get("host", "").lower() and origin.startswith(("http://", "https://"))
    )


async def _answer(send: Send, status: int, words: str) -> None:
    """A short answer in plain text, or the way to another page."""
    way = [(b"location", words.encode())] if status == 303 else []
    sealed = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    kind = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *way, *sealed]})
    await send({"type": "http.response.body", "body": words.encode()})
