"""Runs the command line over and over in children of one process that has imported everything, and kills them when it is told to.

A line of JSON comes in for each run, its arguments and the seconds after which it is killed (none: never); one goes out with what became
of it. Or one comes for each of several at once, which is answered by its process number, and one that waits for it. Reading torch once and
not each time is what makes a thousand kills affordable.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from typing import Any

import torch
from PIL import Image

from sdlora import api, cli, family

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")


def child(arguments: list[str], log: str, script: str = "", audit: str = "") -> None:
    """Become `sdlora`, or a script, with these arguments; never returns."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if audit:
        note_writes(audit)
    sys.argv = [script or "sdlora", *arguments]
    code: Any = 1
    try:
        runpy.run_path(script, run_name="__main__") if script else cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def note_writes(audit: str) -> None:
    """Write down each path that is written to, made, renamed or removed from now on."""
    kept = os.open(audit, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            os.write(kept, f"{os.fsdecode(args[0]) if not isinstance(args[0], int) else args[0]}\n".encode())

    sys.addaudithook(hook)


def start(wanted: dict[str, Any]) -> int:
    pid = os.fork()
    if not pid:
        os.environ.update(wanted.get("environment", {}))
        child(wanted["arguments"], wanted["log"], wanted.get("script", ""), wanted.get("audit", ""))
    return pid


def run(wanted: dict[str, Any]) -> dict[str, Any]:
    began, seconds = time.monotonic(), wanted["seconds"]
    pid = start(wanted)
    while seconds is not None and time.monotonic() - began < seconds:
        time.sleep(min(0.005, seconds))
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}
    if seconds is not None:
        os.kill(pid, signal.SIGKILL)
    return {**wait(pid, 3600.0), "seconds": time.monotonic() - began}


def wait(pid: int, seconds: float) -> dict[str, Any]:
    """The exit code of a child; one that has not ended in time is killed, and has none."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return {"code": os.waitstatus_to_exitcode(status)}
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"code": None}


def main() -> None:
    family.load(family.find(sys.argv[1]), torch.device("cpu"), torch.float32)  # which imports the rest
    Image.init()
    gc.collect()
    gc.freeze()  # children need not walk through all that was imported
    print(json.dumps({"version": torch.__version__, "verbs": len(api.__all__)}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        if "wait" in wanted:
            answer = wait(wanted["wait"], wanted["seconds"])
        elif "seconds" in wanted:
            answer = run(wanted)
        else:
            answer = {"pid": start(wanted)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
