"""What programs may ask of the page, by name and with types: `gradio_client` calls these; none takes a path, all take ids."""

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from sdlora import api
from sdlora.api import UserError
from webui.choose import SCALES, count, scales_of
from webui.easel import NONE, Wish
from webui.house import House

ASKED = ("stop", "save", "sample")


class Calls:
    """Each method is an endpoint of its name."""

    def __init__(self, house: House) -> None:
        self.house = house
        self._offer(self.packs, self.projects, self.runs, self.events, self.start, self.ask, self.judge, self.score, self.keep)
        self._offer(self.draw, concurrency_id="gpu", concurrency_limit=1)

    def packs(self) -> list[str]:
        """Ids of the packs, the newest first."""
        return [found.id for found in self.house.easel.shelf.packs()]

    def projects(self) -> list[str]:
        """Names of the projects, the newest first."""
        return [project.name for project in self.house.projects.all()]

    def runs(self) -> list[dict[str, Any]]:
        """Each run: id, name, state, step, steps and loss; the newest first."""
        found = self.house.projects
        return [
            {"id": found.id_of(one), **{k: getattr(one, k) for k in ("name", "state", "step", "steps", "loss")}} for one in found.runs()
        ]

    def events(self, run: str, since: int = 0) -> dict[str, Any]:
        """What a run's log holds from a byte on, and the byte to ask from next."""
        found, after = api.events(self.house.projects.run(str(run)).folder, max(0, int(since)))
        return {"events": found, "next": after}

    def start(self, project: str) -> str:
        """Let a project be trained with the settings that are kept for it; returns the id of the run."""
        projects = self.house.projects
        chosen = projects.find(str(project))
        out = projects.next_run(chosen)
        self.house.easel.rest()
        api.enqueue(projects.root, api.settle(chosen.table(), chosen.settings), out)
        return out.relative_to(projects.root).as_posix()

    def ask(self, run: str, what: str) -> str:
        """Ask a run that is training to `stop` (it saves first), to `save`, or to `sample`."""
        one = self.house.projects.run(str(run))
        if what not in ASKED or one.state != "running":
            raise UserError(
                "E-UI-14", f"a run that is {one.state} cannot be asked so", one.name, f"ask one that is running to {', '.join(ASKED)}"
            )
        api.ask(one.folder, what)
        return what

    def judge(self, run: str, scales: str = SCALES, checkpoints: int = 4, prompts: int = 6) -> str:
        """Let a run's checkpoints be judged at these scales, in the queue that trains; returns the id in it."""
        one = self.house.projects.run(str(run))
        asked = scales_of(str(scales))
        self.house.easel.rest()
        return api.enqueue_judging(self.house.projects.root, one.folder, asked, most=count(checkpoints, 4), prompts=count(prompts, 6))

    def score(self, run: str) -> dict[str, Any]:
        """What the last judging of a run found, as its `score.json` has it; empty before."""
        return api.read_judged(self.house.projects.run(str(run)).folder / api.SCORE)

    def keep(self, run: str, step: int, scale: float) -> str:
        """Make a checkpoint, with a scale as the one to use, a pack; returns its id."""
        path = api.keep_checkpoint(self.house.projects.run(str(run)).folder, int(step), api.parse_scale(str(scale)))
        return path.relative_to(self.house.projects.root).as_posix()

    def draw(
        self, pack: str = NONE, prompt: str = "", scale: float = 1.0, seed: int = 0, steps: int = 25, guidance: float = 0.0, size: str = ""
    ) -> dict[str, Any]:
        """Base and pack on one seed: addresses of both pictures, their SHA-256, and the command line. Guidance 0 is the base's own."""
        easel = self.house.easel
        guidance = float(guidance) or easel.choose(str(pack)).guidance
        pair = easel.pair(Wish(str(pack), str(prompt), "", int(seed), int(steps), guidance, str(size), float(scale)))
        shown = {
            name: {"url": self.house.links.to(one.path), "sha256": one.sha256}
            for name, one in (("base", pair.base), ("pack", pair.adapter))
        }
        return {**shown, "command": pair.command}

    def _offer(self, *calls: Callable[..., Any], **how: Any) -> None:
        for call in calls:
            gr.api(_told(call), api_name=call.__name__, **how)


def _told(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with user errors told as such; its name, types and words stay."""

    @functools.wraps(call)
    def told(*args: Any, **named: Any) -> Any:
        try:
            return call(*args, **named)
        except (UserError, TypeError, ValueError, OverflowError) as error:
            raise gr.Error(str(error)[:2000], print_exception=False) from None

    return told
