"""The screen Choose: checkpoints by scales in pictures and figures, and the one that is taken becomes a pack."""

import shlex
from typing import Any
from urllib.parse import quote

import gradio as gr

from sdlora import api
from sdlora.api import Record, UserError
from webui.house import HIDDEN, PRIVATE, House, Values, command_line, part, toasts

LEAD = (
    '<p class="lead">The last step is not always the best, nor is scale 1. Each checkpoint is drawn at each scale on the same seeds, and '
    "compared with the pictures that it was to learn and with what the base draws.</p>"
)
SCALES = "0.5, 0.75, 1, 1.25"
MOST = 50
"""Checkpoints, prompts and scales, of each, that are asked for at once."""


class Choose:
    """The checkpoints of a run, chosen from all."""

    def __init__(self, house: House, opened: Any) -> None:
        """`opened` is the event at which the runs are listed."""
        self.house = house
        gr.HTML(LEAD, padding=False)
        with gr.Row(equal_height=True):
            self.run = gr.Dropdown([], value=None, label="Run", elem_id="choose-run", scale=2, min_width=200)
            self.scales = gr.Textbox(SCALES, label="Scales", elem_id="choose-scales", max_length=100, min_width=150)
            self.most = gr.Number(4, label="Checkpoints", precision=0, minimum=1, maximum=MOST, elem_id="choose-most", min_width=90)
            self.prompts = gr.Number(6, label="Prompts", precision=0, minimum=1, maximum=MOST, elem_id="choose-prompts", min_width=90)
            self.begin = gr.Button("Judge", variant="primary", elem_id="judge", elem_classes="beside", scale=0, size="md", min_width=110)
        self.body = gr.HTML(part("/live/choose/"), elem_id="choose", padding=False)
        with gr.Row():
            self.page = gr.DownloadButton("Download the page", elem_id="choose-page", size="sm", interactive=False)
            self.sheet = gr.DownloadButton("Download the grid as PNG", elem_id="choose-grid", size="sm", interactive=False)
            self.ready = gr.Button("Make both ready", elem_id="choose-ready", size="sm")
        self.command = command_line(elem_id="choose-cli")
        self.sent = gr.Textbox(elem_id="choice-sent", **HIDDEN)
        quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
        shown = [self.body, self.page, self.sheet, self.command]
        opened(self.list_runs, {self.run}, [self.run], **quiet).success(self.show, {self.run}, shown, **quiet)
        self.run.input(self.show, {self.run}, shown, **quiet)
        self.begin.click(self.judge, {self.run, self.scales, self.most, self.prompts}, [self.command], **PRIVATE)
        self.ready.click(self.export, {self.run}, [self.page, self.sheet], **PRIVATE)
        self.sent.submit(self.take, {self.run, self.sent}, [self.command], **quiet)

    def list_runs(self, values: Values) -> Values:
        """Read the folder again; the choice stays if it is still there, else the newest run is chosen."""
        ids = [self.house.projects.id_of(one) for one in self.house.projects.runs() if one.step]
        return {self.run: gr.Dropdown(ids, value=values[self.run] if values[self.run] in ids else next(iter(ids), None))}

    def show(self, values: Values) -> Values:
        """Another run."""
        name = values[self.run] or ""
        waits = [gr.DownloadButton(value=None, interactive=False) for _ in range(2)]
        words = ["sdlora", "find", "best", str(self.house.projects.root / name)] if name else []
        return {self.body: part(f"/live/choose/{quote(name)}"), self.page: waits[0], self.sheet: waits[1], self.command: shlex.join(words)}

    def judge(self, values: Values) -> Values:
        """Let the checkpoints be judged, in the queue that trains: it goes on when the page is gone."""
        with toasts():
            one, root = self._run(values), self.house.projects.root
            scales = scales_of(values[self.scales] or SCALES)
            counts = {"most": count(values[self.most], 4), "prompts": count(values[self.prompts], 6)}
            self.house.easel.rest()
            api.enqueue_judging(root, one.folder, scales, **counts)
        options = [word for name, number in counts.items() for word in (f"--{name}", str(number))]
        words = ["sdlora", "find", "best", str(one.folder), "--scales", ",".join(f"{scale:g}" for scale in scales), *options]
        return {self.command: shlex.join(words)}

    def export(self, values: Values) -> Values:
        """The page and the grid, copied to where files may be given out from."""
        with toasts():
            one = self._run(values)
            made = []
            for name in ("score.html", "grid.png"):
                path = one.folder / api.SCORE / name
                if not path.is_file():
                    raise UserError("E-UI-19", "these checkpoints were not judged yet", one.name, "press Judge first")
                copy = self.house.easel.folder.parent / "judged" / f"{one.name}-{name}"
                api.save_bytes(copy, path.read_bytes())
                made.append(gr.DownloadButton(value=str(copy), interactive=True))
        return {self.page: made[0], self.sheet: made[1]}

    def take(self, values: Values) -> Values:
        """Make a checkpoint, with its scale as the one to use, a pack beside the run's own."""
        step, _, scale = str(values[self.sent] or "").partition(":")
        with toasts():
            if not step.isascii() or not step.isdigit():
                raise UserError("E-UI-20", "this names no checkpoint", step[:40], "press one of the buttons")
            one = self._run(values)
            path = api.keep_checkpoint(one.folder, int(step), api.parse_scale(scale))
        gr.Info(f"{path.name} lies beside the run's own pack: Studio and Share list it first.")
        return {self.command: shlex.join(["sdlora", "run", "keep", str(one.folder), "--step", step, "--scale", scale])}

    def _run(self, values: Values) -> Record:
        return self.house.projects.run(values[self.run] or "")


def scales_of(text: str) -> list[float]:
    """Scales as they are typed, separated by commas. Raises `UserError`."""
    scales = [api.parse_scale(one.strip()) for one in text.split(",")]
    if len(scales) > MOST:
        raise UserError("E-UI-21", f"{len(scales)} scales are more than are judged at once", "scales", f"name {MOST} at most")
    return scales


def count(said: Any, usual: int) -> int:
    """A number of things that the page was given; what it lacks is the usual one."""
    return min(MOST, max(1, int(said or usual)))
