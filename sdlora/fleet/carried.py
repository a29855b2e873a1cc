"""`python -m sdlora.fleet.carried STORE NAME ATTEMPT`: a job whose folder lies in shared storage that is no path of this node.

The job's folder, with a cache of its own, is pulled to this node, trained in, and pushed whenever a checkpoint was written and at the end;
the pack and its pictures are then put into STORE/packs/NAME as plain files.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from sdlora import children, lock, safeio
from sdlora.data import store as caches
from sdlora.errors import UserError
from sdlora.fleet import storage
from sdlora.fleet.storage import Storage
from sdlora.streams import make_streams_safe

LOOK_S = 0.5
WAIT_S, WAITS = 30.0, 20
"""Between, and number of, further tries to push what is finished."""
SHOWN = ("*.safetensors", "*.png", "*.html", "*/*.safetensors", "*/*.png", "*/*.html")
SCRATCH = "SDLORA_FLEET_SCRATCH"


def carry(shared: Storage, name: str, attempt: int, scratch: Path) -> int:
    """Pull, train, push; the exit code of the training. Raises `UserError`."""
    place, work = f"runs/{name}", scratch / "work"
    with lock.held(scratch):
        settings = shared.read(f"jobs/{name}.toml")
        if settings is None:
            raise UserError("E-FLEET-15", "the settings of this job are not in the shared storage", f"jobs/{name}.toml", "add it again")
        kept = checkpoints(work)
        if not kept or kept < newest(shared, place):  # else a push failed here, and this node is further
            storage.pull(shared, place, work)
        safeio.write(scratch / "settings.toml", settings)
        code = _trained(shared, name, attempt, scratch)
        for left in range(WAITS, -1, -1):
            try:
                storage.push(shared, place, work, attempt)
                break
            except UserError as error:
                if not left:
                    raise UserError(error.code, f"{error}; the job's folder is kept on this node", work, "", error.exit_code) from error
                print(f"{error}; trying again", flush=True)
                time.sleep(WAIT_S)
        if code == 0:
            for path in sorted({one for pattern in SHOWN for one in (work / "run").glob(pattern)}):
                shared.write(f"packs/{name}/{path.relative_to(work / 'run').as_posix()}", path.read_bytes())
    return code


def _trained(shared: Storage, name: str, attempt: int, scratch: Path) -> int:
    """Train in the pulled folder, pushing it after each checkpoint. A push that fails is told and tried again after the next one."""
    work = scratch / "work"
    words = ["-m", "sdlora.cli", "train", "--config", str(scratch / "settings.toml"), "--out", str(work / "run")]
    process = children.start(["-m", "sdlora.fleet.bound", str(os.getpid()), *words], {caches.PLACE: str(work / "cache")})
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    pushed, looked = checkpoints(work), time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(LOOK_S)
            if checkpoints(work) != pushed:
                pushed = checkpoints(work)
                try:
                    storage.push(shared, f"runs/{name}", work, attempt)
                except FileNotFoundError:  # it was replaced meanwhile: the next look pushes
                    pushed = []
                except UserError as error:
                    print(f"{error}; training goes on", flush=True)
            if time.monotonic() - looked > 10 * LOOK_S:
                looked = time.monotonic()
                if shared.read(f"stops/{name}") is not None:
                    process.terminate()
                    shared.remove(f"stops/{name}")
    finally:
        signal.signal(signal.SIGTERM, before)
        process.kill()  # only if something broke: otherwise it has ended
    return process.wait()


def checkpoints(work: Path) -> list[str]:
    """The newest checkpoint of each run of a job."""
    newest: dict[Path, str] = {}
    for path in sorted(work.glob("run/**/checkpoints/ckpt-*/state.json")):
        newest[path.parent.parent] = path.parent.name
    return [newest[key] for key in sorted(newest)]


def newest(shared: Storage, place: str) -> list[str]:
    """The same, of what was pushed last."""
    found: dict[str, str] = {}
    for one in storage.manifests(shared, place)[-1:]:
        for name in sorted(one.files):
            parts = name.split("/")
            if parts[-1] == "state.json" and parts[-3:-2] == ["checkpoints"]:
                found["/".join(parts[:-2])] = parts[-2]
    return [found[key] for key in sorted(found)]


def main(address: str, name: str, attempt: str) -> int:
    usual = caches.place(os.environ) / "fleet"
    scratch = Path(os.environ.get(SCRATCH) or usual) / hashlib.sha256(f"{address}\0{name}".encode()).hexdigest()[:16]
    make_streams_safe()
    try:
        code = carry(Storage.open(address), name, int(attempt), scratch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
