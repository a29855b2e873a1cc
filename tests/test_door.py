"""The page's server, attacked: what it gives out, whom it lets in, how much it takes."""

import contextlib
import http.client
import json
import ntpath
import os
import posixpath
import re
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from small import PATIENCE_S, any_port, draw_folder

from sdlora.api import UserError
from webui import app, door
from webui.app import Served
from webui.door import FILE, Door, lies_below
from webui.easel import Wish
from webui.links import Links
from webui.login import COOKIE, MOST_FAILURES, Login, password_of

SECRET = f"secret-{secrets.token_hex(8)}"
PASSWORD = "correct horse"


class Caller:
    """Sends exactly what it is told, as no browser would."""

    def __init__(self, served: Served, cookie: str = "") -> None:
        self.at = served.url.removeprefix("http://")
        self.cookie = cookie

    def __call__(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.at, timeout=PATIENCE_S)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        said = {"host": self.at, "content-length": str(len(body)), "cookie": self.cookie}
        for name, value in (said | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            if value:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content

    def upload(self, name: str, content: bytes = b"x", **headers: str) -> tuple[int, dict[str, str], bytes]:
        body = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'.encode()
        kind = "multipart/form-data; boundary=b"
        return self("POST", "/gradio_api/upload", body + content + b"\r\n--b--\r\n", content_type=kind, **headers)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a secret beside it, and one in it that is no output."""
    root = tmp_path_factory.mktemp("door") / "root"
    root.mkdir()
    (root.parent / "secret.txt").write_text(SECRET)
    (root / "notes.txt").write_text(SECRET)
    return root


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    served = app.launch(root, any_port())
    yield served
    served.close()


@pytest.fixture(scope="module")
def guarded(root: Path) -> Iterator[Served]:
    """The same with a login."""
    served = app.launch(root, any_port(), "127.0.0.1", Login.with_password(PASSWORD))
    yield served
    served.close()


@pytest.fixture
def call(served: Served) -> Caller:
    return Caller(served)


def payloads(root: Path, outputs: str) -> list[str]:
    """Ways to say "secret.txt", which lies beside the data folder, or "notes.txt" in it."""
    goal = str(root.parent / "secret.txt")
    link = Path(outputs) / "pictures" / "link.png"
    if not link.exists():
        link.symlink_to(goal)
    ups = [
        up * depth
        for up in ("../", "..\\", "..%2f", "..%5c", "%2e%2e/", "%2e%2e%2f", "%252e%252e%252f", "....//", "..;/")
        for depth in (1, 2, 4, 9)
    ]
    plain = [
        goal,
        f"/{goal}",
        f"//{goal}",
        f"file://{goal}",
        f"file:{goal}",
        f"\\\\localhost\\c$\\{goal}",
        f"C:\\{goal}",
        f"{goal}\0.png",
        f"{goal}%00.png",
    ]
    plain += [
        str(root / "notes.txt"),
        quote(goal, safe=""),
        quote(quote(goal, safe=""), safe=""),
        f"{goal}?x",
        f"{goal}#.png",
        "/etc/passwd",
        "/proc/self/environ",
    ]
    plain += [
        f"~/{goal}",
        f"%20{goal}",
        f"{goal}/",
        f"{goal}.",
        goal.upper(),
        "notes.txt",
        "./notes.txt",
        "pyproject.toml",
        "sdlora/api.py",
    ]
    around = [f"{outputs}/{up}{goal.lstrip('/')}" for up in ("../../../../../../", "..%2f" * 6, "%2e%2e/" * 6, "..\\" * 6)]
    return [*(up + goal.lstrip("/") for up in ups), *plain, *around, str(link), f"{outputs}/pictures/../pictures/link.png"]


def test_no_path_that_a_client_thinks_up_leads_to_a_file(call: Caller, root: Path, served: Served) -> None:
    tried, outputs = payloads(root, served.folder.name), served.folder.name
    assert len(tried) >= 60
    for place in (
        "/gradio_api/file=",
        "/gradio_api/file/",
        "/shown/",
        "/live/pictures/",
        "/live/watch/",
        "/live/choose/",
        "/assets/",
        "/static/",
        "/",
    ):
        for payload in tried:
            status, _, content = call("GET", place + payload.replace(" ", "%20").replace("\0", "%00"))
            assert SECRET.encode() not in content, (place, payload)
            assert b"root:" not in content
            assert status in (200, 400, 403, 404, 204), (place, payload, status)
    picture = Path(outputs) / "pictures" / "own.png"  # the control: what is an output is given out
    picture.write_bytes(b"own picture")
    assert call("GET", f"/gradio_api/file={picture}")[2] == b"own picture"


@contextlib.contextmanager
def temporary_behind(link: Path) -> Iterator[None]:
    """The system's temporary folder lies behind a link, as on macOS."""
    real = link.with_name(f"{link.name}-real")
    real.mkdir()
    link.symlink_to(real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(link))
        yield


def test_what_is_drawn_is_given_out_where_the_temporary_folder_lies_behind_a_link(root: Path, tmp_path: Path) -> None:
    with temporary_behind(tmp_path / "tmp"):
        served = app.launch(root, any_port())
    try:
        folder = Path(served.folder.name)
        assert folder == Path(os.path.realpath(folder)), "every path in it is the one that paths are compared with"
        call, drawn = Caller(served), app.new_house(root, folder).easel.pair(Wish("", "mira", "", 1, 1, 1.0, "64x64", 1.0))
        status, headers, content = call("GET", FILE + quote(str(drawn.base.path), safe=""))
        assert (status, headers["content-type"], content) == (200, "image/png", drawn.base.path.read_bytes())
        by_link = tmp_path / "tmp" / drawn.base.path.relative_to(tmp_path / "tmp-real")
        assert call("GET", FILE + quote(str(by_link), safe=""))[0] == 200
        for escape in (root / "notes.txt", tmp_path / "tmp" / "x.png", f"{folder}/../x.png", f"{folder}-beside/x.png"):
            assert call("GET", FILE + quote(str(escape), safe=""))[0] == 403, escape
    finally:
        served.close()
    assert not folder.exists()


class Windows(ModuleType):
    """Windows' paths, on a disk with one short name and one link that leads out."""

    LONG = "C:\\Users\\Ann Lee\\AppData\\Local\\Temp"

    def __init__(self) -> None:
        super().__init__("ntpath")
        self.__dict__.update(vars(ntpath), realpath=self.realpath, looked=[])

    def realpath(self, name: str) -> str:
        self.looked.append(name)
        real = re.sub(r"(?i)^C:\\Users\\ANNLEE~1\\", lambda _: "C:\\Users\\Ann Lee\\", ntpath.normpath(name))
        return "C:\\Windows\\win.ini" if ntpath.basename(real) == "link.png" else real


OUTPUTS = f"{Windows.LONG}\\sdlora-ui-1"
GIVEN = [
    f"{OUTPUTS}\\pictures\\mira-1.png",
    f"{OUTPUTS}\\pictures\\mira-1.png".replace("\\", "/"),
    f"c{OUTPUTS[1:]}\\pictures\\mira-1.png",
    f"{OUTPUTS.upper()}\\PICTURES\\mira-1.png",
    f"{OUTPUTS}\\0a1b\\\u7f8e\u7f85 (1).zip",
    f"{OUTPUTS}\\pictures\\console.png",
    OUTPUTS.replace("Ann Lee", "ANNLEE~1") + "\\pictures\\mira-1.png",
]
KEPT = [
    "",
    "x.png",
    "\\x.png",
    "C:x.png",
    "C:\\Windows\\win.ini",
    Windows.LONG + "\\x.png",
    OUTPUTS,
    f"{OUTPUTS}-beside\\x.png",
    f"{OUTPUTS}\\..\\x.png",
    f"{OUTPUTS}/../x.png",
    f"{OUTPUTS}\\pictures\\..\\pictures\\mira-1.png",
    f"{OUTPUTS}\\pictures\\link.png",
    f"{OUTPUTS}\\pictures\\mira-1.png:hidden",
    f"{OUTPUTS}\\pictures\\mira-1.png::$DATA",
    f"{OUTPUTS}\\pictures:stream\\mira-1.png",
    *(f"{OUTPUTS}\\pictures\\{name}" for name in ("NUL", "con.png", "Com1", "lpt9.x.png", "AUX .png", "com\u00b9.png", "CONOUT$")),
    f"{OUTPUTS}\\pictures\\mira-1.png.",
    f"{OUTPUTS}\\pictures\\mira-1.png ",
    f"{OUTPUTS}\\pictures\\mira-1.png\0",
    f"{OUTPUTS}\\pictures\\mira-?.png",
    f"{OUTPUTS}\\%2e%2e\\x.png",
    f"{OUTPUTS}\\mira%00.png",
]
ELSEWHERE = [
    f"D{OUTPUTS[1:]}\\pictures\\mira-1.png",
    f"\\\\host\\C$\\{OUTPUTS[3:]}\\pictures\\mira-1.png",
    f"//host/share/{OUTPUTS[3:]}/x.png",
    f"\\\\?\\{OUTPUTS}\\pictures\\mira-1.png",
    f"\\\\.\\{OUTPUTS}\\pictures\\mira-1.png",
    "\\\\?\\UNC\\host\\share\\x.png",
    f"\\??\\{OUTPUTS}\\pictures\\mira-1.png",
    f"file:///{OUTPUTS}/x.png",
]
"""Not even looked at: a look at another machine logs in there."""


def test_on_windows_what_is_drawn_is_given_out_and_nothing_else() -> None:
    windows = Windows()
    for name in GIVEN:
        assert lies_below(name, OUTPUTS, windows), name
    for name in KEPT:
        assert not lies_below(name, OUTPUTS, windows), name
    windows.looked.clear()
    for name in ELSEWHERE:
        assert not lies_below(name, OUTPUTS, windows), name
    assert windows.looked == []
    share = "\\\\server\\profiles\\ann\\sdlora-ui-1"
    assert lies_below(f"{share}\\x.png", share, windows)
    assert not lies_below("\\\\server\\other\\ann\\sdlora-ui-1\\x.png", share, windows)


def test_a_link_as_the_page_makes_it_on_windows_is_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Door(None, Path("."))  # type: ignore[arg-type]
    one.outputs = OUTPUTS  # type: ignore[assignment]
    monkeypatch.setattr(door, "os", type("os", (), {"path": Windows()}))
    for name in GIVEN:
        for safe in ("", "/:\\", "/"):
            assert one.gives((FILE + quote(name, safe=safe)).encode()), (name, safe)
    for name in (*KEPT, *ELSEWHERE):
        for made in (FILE + quote(name, safe=""), FILE + quote(quote(name, safe=""), safe=""), f"{FILE}/../file={quote(name)}"):
            assert not one.gives(made.encode()), made
    hidden = f"{FILE[:-1]}%3DC:/Windows/win.ini/file={quote(GIVEN[0], safe='')}"  # what is served is what stands behind the first "file="
    assert not one.gives(hidden.encode())


def test_elsewhere_a_backslash_is_in_no_name_that_is_given_out() -> None:
    assert lies_below("/tmp/ui/con:1.png", "/tmp/ui", posixpath)
    for name in ("/tmp/ui/..\\x.png", "/tmp/ui/a\\b.png", "tmp/ui/x.png", "/tmp/ui", "/tmp/ui2/x.png", "//tmp/ui2/x.png"):
        assert not lies_below(name, "/tmp/ui", posixpath), name


def test_no_argument_of_a_call_leads_to_a_file(root: Path, served: Served) -> None:
    from webui.calls import Calls

    house = app.new_house(root, Path(served.folder.name))
    calls = object.__new__(Calls)
    calls.house = house
    for payload in payloads(root, served.folder.name):
        for attempt in (
            lambda p: calls.draw(p),
            calls.start,
            calls.events,
            lambda p: calls.ask(p, "stop"),
            calls.judge,
            calls.score,
            lambda p: calls.keep(p, 1, 1.0),
            lambda p: house.projects.find(p),
        ):
            with pytest.raises((UserError, ValueError)) as refused:
                attempt(payload)
            assert SECRET not in str(refused.value)
    with pytest.raises(UserError, match="E-UI-06"):
        house.projects.allowed("..")
    (root / "pictures").mkdir(exist_ok=True)
    assert house.projects.allowed("pictures") == (root / "pictures").resolve()
    (root / "way-out").symlink_to(root.parent)
    for typed in ("way-out", "/", "~", "", str(root.parent), "pictures/../.."):
        with pytest.raises(UserError, match="E-UI-06"):
            house.projects.allowed(typed)
    with pytest.raises(UserError, match="E-UI-06"):  # and none at all where others can reach the page
        app.new_house(root, Path(served.folder.name), listens=True).projects.allowed("pictures")


FILES = ("file", "uploadbutton")
"""Components that take files."""


class Listener:
    """A server on this machine that counts who comes."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port, self.came, self.somebody = self.socket.getsockname()[1], 0, threading.Event()
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.socket.accept()[0].close()
                self.came += 1
                self.somebody.set()


def test_no_address_in_a_call_is_fetched(call: Caller) -> None:
    """Every event of the page that takes a file is given one that is said to lie at an address of this machine."""
    listener = Listener()
    config = json.loads(call("GET", "/config")[2])
    kinds = {one["id"]: one["type"] for one in config["components"]}
    takers = [one for one in config["dependencies"] if any(kinds[place] in FILES for place in one["inputs"])]
    assert len(takers) >= 4
    for host in ("127.0.0.1", "0x7f000001", "[::ffff:127.0.0.1]", "localhost"):
        address = f"http://{host}:{listener.port}/a.png"
        for path in (address, f"/gradio_api/file={address}", ""):
            given = {"path": path, "url": address, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
            for one in takers:
                data = [given if kinds[place] in FILES else None for place in one["inputs"]]
                body = {"data": data, "fn_index": one["id"], "session_hash": "ssrf", "trigger_id": one["inputs"][0]}
                call("POST", "/gradio_api/queue/join", json.dumps(body).encode(), content_type="application/json")
        said = call("GET", "/gradio_api/queue/data?session_hash=ssrf")[2].decode()  # answers when all of them are through
        ends = [line for line in said.splitlines() if '"process_completed"' in line]
        assert len(ends) >= len(takers)
        assert not any(json.loads(line.removeprefix("data: "))["success"] for line in ends)
    assert listener.came == 0
    with contextlib.closing(socket.create_connection(("127.0.0.1", listener.port))):  # the control: it would have been counted
        assert listener.somebody.wait(PATIENCE_S)
    assert listener.came == 1
    listener.socket.close()


def test_a_setting_names_no_file_outside(root: Path, tmp_path: Path) -> None:
    projects = app.new_house(root, tmp_path).projects
    (root / "model.safetensors").write_bytes(b"")
    projects.check_paths({"base": str(root / "model.safetensors"), "x": ["a/b", "mira, blue"]})
    for value in ("/etc/passwd", "../x", "~/x", "C:\\x", str(root.parent / "secret.txt"), "a\\b"):
        with pytest.raises(UserError, match="E-UI-06"):
            projects.check_paths({"train": {"deep": [value]}})


def test_an_address_of_a_picture_cannot_be_made_up(tmp_path: Path) -> None:
    picture = draw_folder(tmp_path / "p") / "a.png"
    links = Links()
    path = next(iter(sorted(picture.parent.glob("*.png"))))
    token = links.to(path).removeprefix("/shown/")
    found = links.content(token)
    assert found is not None
    assert found[0] == path.read_bytes()
    small = links.content(links.to(path, 16).removeprefix("/shown/"))
    assert small is not None
    assert small[1] == "image/jpeg"
    assert Links().content(token) is None  # another key
    for i in range(0, len(token) - 1, 7):
        assert links.content(token[:i] + ("A" if token[i] != "A" else "B") + token[i + 1 :]) is None
    assert links.content("") is None
    assert links.content("%%%") is None
    (tmp_path / "plain.txt").write_text(SECRET)
    assert links.content(links.to(tmp_path / "plain.txt").removeprefix("/shown/")) is None  # no picture, though ours


def test_every_answer_carries_the_policy(call: Caller) -> None:
    for path in ("/", "/healthz", "/live/home", "/config", "/nowhere", "/page.js"):
        _, headers, _ = call("GET", path)
        assert "default-src 'self'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    assert call("GET", "/healthz")[2] == b'{"status":"ok"}'


def test_another_name_or_another_page_is_refused(call: Caller) -> None:
    for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.0.1", ""):
        assert call("GET", "/", host=host)[0] == 400, host
    assert call("GET", "/", host="localhost:1")[0] == 200
    assert call.upload("a.png", origin="http://evil.example")[0] == 403
    assert call.upload("a.png", origin="null")[0] == 403
    assert call.upload("a.png", sec_fetch_site="cross-site")[0] == 403
    assert call.upload("a.png", origin=f"http://{call.at}", sec_fetch_site="same-origin")[0] == 200


def test_uploads_are_bounded_and_stay_where_they_belong(call: Caller, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path for path in Path(served.folder.name).parent.glob("*") if path.name.startswith("escaped")}
    for name in ("../../escaped.png", "..%2f..%2fescaped.png", "/tmp/escaped.png", "a" * 3000 + ".png", "escaped\\..\\x.png"):
        status, _, content = call.upload(name)
        assert status in (200, 400, 422, 500), name
        for place in json.loads(content) if status == 200 else []:
            assert Path(os.path.realpath(place)).is_relative_to(os.path.realpath(served.folder.name))
    assert {path for path in Path(served.folder.name).parent.glob("*") if path.name.startswith("escaped")} == before
    monkeypatch.setattr(door, "MAX_UPLOAD", 1000)
    assert call.upload("a.png", b"x" * 2000)[0] == 413
    kind = "multipart/form-data; boundary=b"
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    endless = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [head, *[b"y" * 500] * 20]) + b"0\r\n\r\n"
    sent = call("POST", "/gradio_api/upload", endless, content_length="", transfer_encoding="chunked", content_type=kind)
    assert sent[0] in (400, 413), sent
    monkeypatch.setattr(door, "MAX_FILES", 1)
    assert call.upload("a.png")[0] == 507
    assert call("POST", "/gradio_api/queue/join", b"x", content_length=str(10**9))[0] == 413


def test_what_is_old_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_FILES", 2)
    for name in ("old", "new"):
        (tmp_path / name).write_text("x")
    one = Door(None, tmp_path)  # type: ignore[arg-type]
    assert one._is_full()
    os.utime(tmp_path / "old", (0, 0))
    one.looked = 0.0
    assert not one._is_full()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_active_content_is_no_page(call: Caller) -> None:
    for name in ("x.html", "x.svg", "x.js"):
        _, _, content = call.upload(name, b"<script>alert(1)</script>")
        (place,) = json.loads(content)
        _, headers, _ = call("GET", f"/gradio_api/file={quote(place)}")
        assert headers["content-disposition"].startswith("attachment"), name
        assert headers["x-content-type-options"] == "nosniff"


def test_with_a_login_every_route_is_closed_to_who_has_none(guarded: Served) -> None:
    anybody = Caller(guarded)
    routes = {
        "/",
        "/live/home",
        "/live/pictures/x",
        "/live/watch/x",
        "/shown/x",
        "/page.js",
        "/config",
        "/theme.css",
        "/static/x",
        "/assets/x",
    }
    routes |= {
        f"/gradio_api/{name}" for name in ("info", "upload", "queue/join", "queue/data", "call/packs", "run/packs", "file=/etc/passwd")
    }
    routes |= {
        f"/gradio_api/{name}"
        for name in ("heartbeat/x", "startup-events", "app_id", "component_server", "cancel", "reset", "upload_progress")
    }
    for route in routes:
        for method in ("GET", "POST"):
            status, headers, _ = anybody(method, route)
            assert status == 401 or (status == 303 and headers["location"] == "/login"), (method, route, status)
    assert anybody("GET", "/healthz")[0] == 200
    assert b"Password" in anybody("GET", "/login")[2]
    assert anybody("GET", "/", cookie=f"{COOKIE}=guess")[0] == 303
    status, headers, _ = anybody("POST", "/login", urlencode({"password": PASSWORD}).encode())
    assert status == 303
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=strict" in headers["set-cookie"]
    known = Caller(guarded, headers["set-cookie"].partition(";")[0])
    assert known("GET", "/live/home")[0] == 200
    assert known("POST", "/logout")[0] == 303
    assert known("GET", "/live/home")[0] == 401


def test_routes_that_are_not_listed_do_not_exist(call: Caller) -> None:
    for path in (
        "/monitoring",
        "/docs",
        "/openapi.json",
        "/gradio_api/deep_link",
        "/gradio_api/proxy=http://x",
        "/gradio_api/stream/x",
        "/pwa_icon",
    ):
        assert call("GET", path)[0] == 404, path


def test_guessing_ends() -> None:
    login = Login.with_password(PASSWORD)
    assert [login.enter("wrong")[0] for _ in range(MOST_FAILURES + 2)] == [403] * MOST_FAILURES + [429, 429]
    assert login.enter(PASSWORD)[0] == 429
    login.failures.clear()
    status, session = login.enter(PASSWORD)
    assert status == 303
    assert login.knows(f"{COOKIE}={session}")
    login.sessions[session] = 0.0
    assert not login.knows(f"{COOKIE}={session}")


def test_a_password_comes_from_a_file_the_environment_or_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").write_text(f"{PASSWORD}\n")
    assert password_of(tmp_path / "p") == (PASSWORD, False)
    new, shown = password_of(None)
    assert shown
    assert new != password_of(None)[0]
    monkeypatch.setenv("SDLORA_PASSWORD", "short")
    with pytest.raises(UserError, match="E-UI-07"):
        password_of(None)
    with pytest.raises(UserError, match="E-UI-07"):
        password_of(tmp_path / "missing")


def test_nobody_else_is_served_without_a_password(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="E-UI-16"):
        app.launch(tmp_path, 1, "0.0.0.0")


def test_names_are_text(root: Path, tmp_path: Path) -> None:
    house = app.new_house(root, tmp_path)
    project = house.projects.begin("odd")
    evil = "<img src=x onerror=alert(1)>.png"
    source = next(iter(draw_folder(tmp_path / "p").glob("*.png")))
    (tmp_path / "pictures" / "x").mkdir(parents=True)
    house.projects._copy(project, [(source, evil)])
    (project.pictures / evil).with_suffix(".txt").write_text("<script>alert(1)</script>")
    found: dict[str, Any] = project.look()
    assert found["totals"]["used"] == 1
    run = root / "<b>run"
    run.mkdir()
    (run / "config.toml").write_text('name = "<script>"\n[train]\nsteps = 3\n[preview]\nprompts = ["<script>"]\n')
    lines = [{"time": 1, "kind": "warning", "text": "<script>"}, {"time": 2, "kind": "failed", "text": "\u001b[31m<script>"}]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for html in (house.live.home(), house.live.pictures("odd"), house.live.watch("<b>run"), house.live.pictures("<script>")):
        assert not re.search(r"<(script|b>run|img src=x)", html)
    assert "&lt;script&gt;" in house.live.watch("<b>run")
