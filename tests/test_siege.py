"""The page's server, besieged: full queues, slow callers, arguments and packs that mean harm, and every route there is."""

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import small
import torch
from test_door import PASSWORD, Caller
from test_hostile import HARM

from sdlora import family
from webui import app
from webui.app import Served
from webui.door import PUBLIC
from webui.easel import Easel
from webui.login import Login

ID = "mira.safetensors"
MOST_GROWTH = 200 * 2**20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a pack of random numbers for the embedded base."""
    root = tmp_path_factory.mktemp("siege")
    small.random_pack(root / ID, family.load(family.find("tiny"), torch.device("cpu"), torch.float32))
    return root


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    served = app.launch(root, small.any_port())
    yield served
    served.close()


@pytest.fixture
def call(served: Served) -> Caller:
    return Caller(served)


class Page:
    """Does what a browser does with the page's events, and nothing that it would keep from doing."""

    def __init__(self, call: Caller) -> None:
        self.call, self.config = call, json.loads(call("GET", "/config")[2])
        self.places = {one["props"].get("elem_id"): one["id"] for one in self.config["components"]}
        self.usual = {one["id"]: one["props"].get("value") for one in self.config["components"]}

    def data(self, event: dict[str, Any], said: dict[str, Any]) -> list[Any]:
        """The arguments of an event: what is said of some components by their id in the page, and what they show at first of the rest."""
        given = {self.places[name]: value for name, value in said.items()}
        return [given.get(place, self.usual[place]) for place in event["inputs"]]

    def event(self, of: str) -> dict[str, Any]:
        """The first event that a component sets off by itself, or the call of that name."""
        for one in self.config["dependencies"]:
            if one["api_name"] == of or any(place == self.places.get(of) for place, _ in one["targets"]):
                return dict(one)
        raise KeyError(of)

    def join(self, event: dict[str, Any], data: list[Any]) -> tuple[int, str]:
        """The status of the answer, and the session in which what comes of it is told."""
        session = secrets.token_hex(8)
        body = {"data": data, "fn_index": event["id"], "session_hash": session, "trigger_id": (event["targets"] or [[None]])[0][0]}
        status, _, content = self.call("POST", "/gradio_api/queue/join", json.dumps(body).encode(), content_type="application/json")
        return status, session if status == 200 else content.decode()

    def told(self, session: str) -> dict[str, Any]:
        """What came of the one event of a session."""
        said = self.call("GET", f"/gradio_api/queue/data?session_hash={session}")[2].decode()
        lines = [json.loads(line.removeprefix("data: ")) for line in said.splitlines() if line.startswith("data: ")]
        (found,) = (line for line in lines if line["msg"] == "process_completed")
        return dict(found)

    def sha256(self, scale: float) -> str:
        """The picture at a scale, drawn by the call for programs."""
        _, session = self.join(self.event("draw"), [ID, "mira", scale, 1, 2, 3.0, ""])
        return str(self.told(session)["output"]["data"][0]["pack"]["sha256"])


@pytest.mark.slow
def test_a_full_queue_says_so_and_drops_nothing_that_it_took(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture is drawn, for as long as others ask: 64 of those wait, and the rest are refused."""
    page = Page(call)
    draw = page.event("draw")
    page.sha256(1.0)  # from now on a picture that is there
    begun, all_have_asked, really = threading.Event(), threading.Event(), Easel.pair

    def pair(easel: Easel, wish: Any) -> Any:
        begun.set()
        assert all_have_asked.wait(small.PATIENCE_S)
        return really(easel, wish)

    monkeypatch.setattr(Easel, "pair", pair)
    slow = page.join(draw, [ID, "mira", 1.0, 2, 2, 3.0, ""])
    assert begun.wait(small.PATIENCE_S)
    with ThreadPoolExecutor(20) as crowd:
        answers = [slow, *crowd.map(lambda _: page.join(draw, [ID, "mira", 1.0, 1, 2, 3.0, ""]), range(90))]
        all_have_asked.set()
        taken = [session for status, session in answers if status == 200]
        refused = [words for status, words in answers if status != 200]
        assert {status for status, _ in answers} == {200, 503}
        assert len(taken) == 1 + 64
        assert all("full" in words.lower() for words in refused)
        assert all(said["success"] for said in crowd.map(page.told, taken))
    assert page.join(draw, [ID, "mira", 1.0, 1, 2, 3.0, ""])[0] == 200, "and is open again"


def test_callers_that_never_finish_keep_nobody_waiting(call: Caller) -> None:
    host, _, port = call.at.partition(":")
    with contextlib.ExitStack() as open_ones:
        for i in range(200):
            slow = open_ones.enter_context(contextlib.closing(socket.create_connection((host, int(port)))))
            slow.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nhost: %s\r\ncontent-length: 1000\r\n%s" % (call.at.encode(), b"\r\nx" * (i % 2))
            )
        assert call("GET", "/live/home")[0] == 200, "while all of them are open"


ODD: dict[str, dict[str, Any]] = {
    "a scale far out": {"scale": 1e9}, "a scale in words": {"scale": "much"}, "no scale": {"scale": None},
    "no number as a scale": {"scale": float("nan")},
    "a prompt of 1 MB": {"prompt": "a" * 2**20}, "a seed below 0": {"seed": -1},
    "a seed that is none": {"seed": float("nan")}, "no steps": {"steps": 0}, "steps without end": {"steps": 10**9},
    "a size of its own": {"size": "100000x100000"}, "a size in words": {"size": "big"}, "a pack elsewhere": {"pack": "/etc/passwd"},
    "a text scale far out": {"apart": True, "text-scale": 1e9},
}  # fmt: skip


def test_odd_arguments_are_refused_in_words(call: Caller) -> None:
    page = Page(call)
    generate = page.event("generate")
    said = {"prompt": "mira", "negative": "", "seed": 1, "steps": 2, "guidance": 3, "scale": 1}
    status, session = page.join(generate, page.data(generate, said))
    told = page.told(session)
    assert told["success"], f"the control: {told}"
    for what, odd in ODD.items():
        status, session = page.join(generate, page.data(generate, said | odd))
        if status == 200:
            answer = page.told(session)
            assert not answer["success"], (what, answer)
            assert "Traceback" not in str(answer)
        else:
            assert 400 <= status < 500, (what, status)
    assert page.join(generate, [])[0] in (200, 400, 422)
    assert call("GET", "/healthz")[0] == 200


@pytest.mark.slow
def test_packs_that_mean_harm_leave_all_as_it_was(call: Caller, root: Path) -> None:
    page, this = Page(call), psutil.Process()
    before, packs = page.sha256(1.0), sorted(root.rglob("*.safetensors"))
    takes, harm = page.event("received"), [make(root / ID) for make in HARM.values()]
    sane = page.join(takes, page.data(takes, {"received": brought(call, "fine.safetensors", (root / ID).read_bytes())}))
    assert page.told(sane[1])["success"], "the control"
    came = sorted(set(root.rglob("*.safetensors")) - set(packs))
    assert [path.name for path in came] == ["fine.safetensors"]
    size = this.memory_info().rss

    def attack(number: int) -> dict[str, Any]:
        given = brought(call, f"bad-{number}.safetensors", harm[number % len(harm)])
        status, session = page.join(takes, page.data(takes, {"received": given}))
        while status == 503:  # as a browser's user would
            time.sleep(0.2)
            status, session = page.join(takes, page.data(takes, {"received": given}))
        return page.told(session)

    with ThreadPoolExecutor(25) as crowd:
        told = [*crowd.map(attack, range(100))]
    assert not any(one["success"] or "Traceback" in str(one) for one in told)
    assert this.memory_info().rss - size < MOST_GROWTH
    assert sorted(set(root.rglob("*.safetensors")) - set(packs)) == came, "nothing of them is kept"
    assert page.sha256(1.0) == before
    assert call("GET", "/healthz")[0] == 200


def brought(call: Caller, name: str, content: bytes) -> dict[str, Any]:
    """A file that was uploaded, as the page names it."""
    (place,) = json.loads(call.upload(name, content)[2])
    return {"path": place, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def test_every_route_there_is_asks_who_comes(root: Path, served: Served, call: Caller) -> None:
    guarded = app.launch(root, small.any_port(), "127.0.0.1", Login.with_password(PASSWORD))
    try:
        anybody, routes = Caller(guarded), list(listed(guarded.server.config.app.app.routes))  # type: ignore[union-attr]
        assert len(routes) > 70
        for method, path in routes:
            status, headers, _ = anybody(method, path)
            if path in PUBLIC:
                assert status in (200, 303, 403)
            else:
                assert status in (401, 404) or (status == 303 and headers["location"] == "/login"), (method, path, status)
        picture = Path(served.folder.name) / "pictures" / "one.png"  # what one server drew, another does not give out
        picture.write_bytes(b"drawn")
        assert call("GET", f"/gradio_api/file={picture}")[2] == b"drawn"
        entered = anybody("POST", "/login", b"password=" + PASSWORD.replace(" ", "+").encode())
        known = Caller(guarded, entered[1]["set-cookie"].partition(";")[0])
        assert known("GET", "/live/home")[0] == 200
        assert known("GET", f"/gradio_api/file={picture}")[0] == 403
    finally:
        guarded.close()


def listed(routes: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of every route of an application and of those mounted in it, with a word for each part that is left open."""
    for route in routes:
        path = before + getattr(route, "path", "")
        if inner := getattr(route, "routes", None):
            yield from listed(inner, path)
        if included := getattr(route, "original_router", None):
            yield from listed(included.routes, before + route.include_context.prefix)
        if not hasattr(route, "path"):
            continue
        for method in sorted((getattr(route, "methods", None) or {"GET"}) - {"HEAD"}):
            yield method, "/" + "/".join("x" if part.startswith("{") else part.partition("{")[0] for part in path.split("/")[1:])
