"""Runs the command line over and over in children of one process that has imported everything, and kills them when it is told to.

A line of JSON comes in for each run, its arguments and the seconds after which it is killed (none: never); one goes out with what became
of it. Reading torch once and not each time is what makes a thousand kills affordable.
"""

import gc
import json
import os
import signal
import sys
import time
from typing import Any

import torch
from PIL import Image

from sdlora import api, cli, family


def child(arguments: list[str], log: str) -> None:
    """Become `sdlora` with these arguments; never returns."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["sdlora", *arguments]
    code: Any = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str], log: str, seconds: float | None) -> dict[str, Any]:
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        child(arguments, log)
    while seconds is not None and time.monotonic() - began < seconds:
        time.sleep(min(0.005, seconds))
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}
    if seconds is not None:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}


def main() -> None:
    family.load(family.find(sys.argv[1]), torch.device("cpu"), torch.float32)  # which imports the rest
    Image.init()
    gc.collect()
    gc.freeze()  # children need not walk through all that was imported
    print(json.dumps({"version": torch.__version__, "verbs": len(api.__all__)}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(run(wanted["arguments"], wanted["log"], wanted["seconds"])), flush=True)


if __name__ == "__main__":
    main()
