"""How fast the page answers while pictures are drawn: many open pages that ask for the state of a run every two seconds.

python bench/pages.py [--pages 50] [--seconds 20]
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

from webui import app

EVERY_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        make_run(Path(root))
        until = time.monotonic() + said.seconds
        drawn, took = measure(Path(root), said.pages, lambda *_: time.monotonic() >= until)
    print(f"{said.pages} pages, {len(took)} requests while {drawn} pictures were drawn: {summary(took)}")


def make_run(root: Path, steps: int = 1000) -> None:
    """A finished run's files, as a run of this length leaves them."""
    run = root / "mira"
    run.mkdir()
    (run / "config.toml").write_text(f'name = "mira"\nbase = "tiny"\nkind = "character"\n[train]\nsteps = {steps}\n')
    events = [{"time": float(step), "kind": "step", "step": step, "loss": 0.1, "data": {"lr": 1e-3}} for step in range(1, steps + 1)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def measure(root: Path, pages: int, enough: Callable[[int, int], bool]) -> tuple[int, list[float]]:
    """How many pictures were drawn meanwhile, and the seconds of each request; it ends once so many pictures and requests are enough."""
    served = app.launch(root, app.free_port(0))
    took, drawn = list[float](), list[int]()

    def look(number: int) -> None:
        time.sleep(EVERY_S * number / pages)
        while not enough(len(drawn), len(took)):
            began = time.monotonic()
            connection = HTTPConnection(served.url.removeprefix("http://"), timeout=60)
            connection.request("GET", "/live/watch/mira")
            assert connection.getresponse().read()
            connection.close()
            took.append(time.monotonic() - began)
            time.sleep(max(0.0, EVERY_S - took[-1]))

    def draw() -> None:
        from gradio_client import Client

        client = Client(served.url, verbose=False)
        while not enough(len(drawn), len(took)):
            client.predict("", "cat face", 1.0, len(drawn), 25, 0.0, "", api_name="/draw")
            drawn.append(1)

    calls: list[Callable[[], None]] = [draw, *(lambda number=number: look(number) for number in range(pages))]  # type: ignore[misc]
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.close()
    return len(drawn), took


def summary(took: list[float]) -> str:
    ordered = sorted(took)
    median, late, last = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95, 1.0))
    return f"median {median * 1000:.0f} ms, 95 % within {late * 1000:.0f} ms, longest {last * 1000:.0f} ms"


if __name__ == "__main__":
    main()
