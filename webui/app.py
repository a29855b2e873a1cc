"""The web page as a whole: built, served on this machine only, and silent towards every other."""

import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the libraries read the environment when they are imported: `keep_local` comes first
    import gradio as gr

HOST = "127.0.0.1"
PORTS = range(7860, 7960)


def serve(port: int, data_root: Path) -> None:
    """Serve the page until Ctrl-C. Port 0 is the first free one of `PORTS`. Raises `UserError` when the port cannot be had."""
    keep_local()
    port = free_port(port)
    if current_thread() is main_thread():  # so that the pictures are cleared away then, too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="sdlora-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # the usual place is shared by all users of the machine, and stays
        demo = build(data_root)
        print(f"studio: {launch(demo, port)}   (Ctrl-C ends it)", flush=True)
        try:
            Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            demo.close(verbose=False)


def build(data_root: Path) -> "gr.Blocks":
    """The page over the packs below `data_root`, with bases and pictures of its own."""
    keep_local()
    import gradio as gr

    from webui.easel import Easel
    from webui.shelf import Shelf
    from webui.studio import Page

    pictures = tempfile.TemporaryDirectory(prefix="pictures-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    with gr.Blocks(title="sdlora studio", analytics_enabled=False) as demo:
        Page(Easel(Shelf(data_root), Path(pictures.name)), demo)
    demo.pictures = pictures  # the folder lives as long as the page
    return demo


def launch(demo: "gr.Blocks", port: int) -> str:
    """Start serving in the background; returns the address."""
    from webui.looks import CSS, theme

    demo.launch(
        server_name=HOST,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        theme=theme(),
        css=CSS,
    )
    return f"http://{HOST}:{port}"


def keep_local() -> None:
    """Tell the libraries to call nobody, and not to go through a proxy to this very machine."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    for name in ("NO_PROXY", "no_proxy"):
        known = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*known, HOST, "localhost"]))


def free_port(port: int) -> int:
    """The port itself if it can be listened on; for 0 the first of `PORTS` that can."""
    from sdlora.api import UserError

    for candidate in [port] if port else PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, candidate))
            except (OSError, OverflowError):
                continue
            return candidate
    which = f"port {port} is" if port else f"ports {PORTS[0]} to {PORTS[-1]} are all"
    raise UserError("E-UI-04", f"{which} in use or not allowed", "--port", "name another, or leave it out to take the first free one")
