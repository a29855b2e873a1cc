"""The server's own routes beside the page: its health, the parts that follow files, pictures, and the login."""

import hashlib
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from sdlora import api
from webui import login as entrance
from webui.house import House
from webui.login import COOKIE, LASTS_S, Login

TEXTS = {"page.js": "text/javascript", "page.css": "text/css"}
HERE = Path(__file__).parent
MAX_FORM = 4096
NOTES = {403: "This is not the password.", 429: "Too many wrong passwords; wait a minute."}


def add_routes(app: FastAPI, house: House, login: Login | None) -> None:
    """Lay them before the page's own."""

    def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    def written(name: str) -> Response:
        text = (HERE / name).read_text("utf-8") + (api.judged_style() if name == "page.css" else "")
        return Response(text, media_type=TEXTS[name])

    def home(request: Request) -> Response:
        api.start_queue(house.projects.root)  # whoever looks sees to it that what waits is trained, too
        return _unless_known(request, house.live.home())

    def pictures(request: Request, name: str) -> Response:
        return _unless_known(request, house.live.pictures(name))

    def watch(request: Request, run: str) -> Response:
        api.start_queue(house.projects.root)
        house.easel.make_room()
        return _unless_known(request, house.live.watch(run))

    def choose(request: Request, run: str) -> Response:
        api.start_queue(house.projects.root)
        house.easel.make_room()
        return _unless_known(request, house.live.choose(run))

    def shown(token: str) -> Response:
        found = house.links.content(token)
        if found is None:
            return Response(status_code=404)
        return Response(found[0], media_type=found[1], headers={"cache-control": "private, max-age=86400, immutable"})

    app.get("/healthz")(health)
    for name in TEXTS:
        app.get(f"/{name}")(lambda name=name: written(name))
    app.get("/live/home")(home)
    app.get("/live/pictures/{name:path}")(pictures)
    app.get("/live/watch/{run:path}")(watch)
    app.get("/live/choose/{run:path}")(choose)
    app.get("/shown/{token}")(shown)
    if login:
        _add_login(app, login)


def _add_login(app: FastAPI, login: Login) -> None:
    def ask() -> HTMLResponse:
        return HTMLResponse(entrance.PAGE.format(note=""))

    async def enter(request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_FORM:
                return Response(status_code=413)
        password = parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0]
        status, session = login.enter(password)
        if not session:
            return HTMLResponse(entrance.PAGE.format(note=NOTES[status]), status)
        answer = Response(status_code=status, headers={"location": "/"})
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, session, max_age=LASTS_S, httponly=True, samesite="strict", secure=secure)
        return answer

    async def leave(request: Request) -> Response:
        login.leave(request.headers.get("cookie", ""))
        return Response(status_code=303, headers={"location": "/login"})

    app.get("/login")(ask)
    app.post("/login")(enter)
    app.post("/logout")(leave)


def _unless_known(request: Request, html: str) -> Response:
    """The part, or a word that it is as it was."""
    tag = f'"{hashlib.blake2b(html.encode("utf-8", "replace"), digest_size=12).hexdigest()}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=204, headers={"etag": tag})
    return Response(html.encode("utf-8", "replace"), media_type="text/html", headers={"etag": tag, "cache-control": "no-store"})
