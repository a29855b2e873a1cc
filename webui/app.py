"""The server: the page behind its door, on this machine only unless asked, and silent towards every other."""

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the libraries read the environment when they are imported: `keep_local` comes first
    import gradio as gr
    import uvicorn

    from webui.house import House
    from webui.login import Login

HOST = "127.0.0.1"
LOCAL = (HOST, "localhost", "::1")
PORTS = range(7860, 7960)


@dataclass
class Served:
    """A page that is being served in the background."""

    url: str
    server: "uvicorn.Server"
    thread: Thread
    folder: "TemporaryDirectory[str]"

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)
        self.folder.cleanup()


def serve(port: int, data_root: Path, listen: str = "", password_file: Path | None = None) -> None:
    """Serve the page until Ctrl-C. Port 0 is the first free one of `PORTS`. Raises `UserError` when the port cannot be had."""
    keep_local()
    from webui.login import Login, password_of

    login = None
    if listen and listen not in LOCAL:
        password, is_new = password_of(password_file)
        login = Login.with_password(password)
        if is_new:
            print(f"password: {password}", flush=True)
    if current_thread() is main_thread():  # so that the pictures are cleared away then, too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    served = launch(data_root, free_port(port, listen or HOST), listen or HOST, login)
    print(f"studio: {served.url}   (Ctrl-C ends it; a run that trains goes on)", flush=True)
    try:
        while served.thread.is_alive():
            served.thread.join(1)
    except KeyboardInterrupt:
        pass
    finally:
        served.close()


def launch(data_root: Path, port: int, host: str = HOST, login: "Login | None" = None) -> Served:
    """Start serving in the background. Raises `UserError` where others could come in without a password."""
    keep_local()
    from sdlora.api import UserError, scratch_folder

    if host not in LOCAL and login is None:
        raise UserError("E-UI-16", "others on the network could use this page without a password", host, "leave --listen out, or give one")
    folder = scratch_folder("sdlora-ui-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name  # the usual place is shared by all users of the machine, and stays
    import uvicorn

    app = behind_door(data_root, Path(folder.name), host, login)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="critical", ws="none", timeout_keep_alive=30))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.05)
    return Served(f"http://{f'[{host}]' if ':' in host else host}:{port}", server, thread, folder)


def behind_door(data_root: Path, folder: Path, host: str = HOST, login: "Login | None" = None) -> Any:
    """The whole server as an ASGI application; uploads and what is drawn lie in `folder`."""
    import gradio as gr
    from fastapi import FastAPI

    from webui.door import MAX_UPLOAD, Door
    from webui.looks import theme
    from webui.routes import add_routes

    house = new_house(data_root, folder, listens=login is not None)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_routes(app, house, login)
    demo = build(house)
    demo.queue(max_size=64, default_concurrency_limit=8)
    head = '<link rel="stylesheet" href="/page.css"><script src="/page.js" defer></script>'
    gr.mount_gradio_app(
        app, demo, path="/", server_name=host, footer_links=[], run_history=False, ssr_mode=False, theme=theme(), head=head, css="",
        max_file_size=MAX_UPLOAD, allowed_paths=[str(folder)], show_error=False, enable_monitoring=False, pwa=False,
    )  # fmt: skip
    return Door(app, folder, host, login)


def new_house(data_root: Path, folder: Path, listens: bool = False) -> "House":
    """What the screens share; pictures are drawn into `folder`."""
    from webui.easel import Easel
    from webui.house import House
    from webui.links import Links
    from webui.live import Live
    from webui.projects import Projects
    from webui.shelf import Shelf

    projects, links = Projects(data_root, listens), Links()

    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    return House(projects, links, Live(projects, links), Easel(Shelf(data_root), pictures, projects.busy))


def build(house: "House") -> "gr.Blocks":
    """The page over the projects, runs and packs of a house."""
    keep_local()
    import gradio as gr

    from webui.board import Board
    from webui.calls import Calls

    with gr.Blocks(title="sdlora", analytics_enabled=False) as demo:
        Calls(house)  # first: an event of the page would take its name
        Board(house, demo)
    return demo


def keep_local() -> None:
    """Tell the libraries to call nobody, and not to go through a proxy to this very machine."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    for name in ("NO_PROXY", "no_proxy"):
        known = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*known, HOST, "localhost"]))


def free_port(port: int, host: str = HOST) -> int:
    """The port itself if it can be listened on; for 0 the first of `PORTS` that can."""
    from sdlora.api import UserError

    for candidate in [port] if port else PORTS:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except (OSError, OverflowError):
                continue
            return candidate
    which = f"port {port} is" if port else f"ports {PORTS[0]} to {PORTS[-1]} are all"
    raise UserError("E-UI-04", f"{which} in use or not allowed", "--port", "name another, or leave it out to take the first free one")
