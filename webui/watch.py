"""The screen Watch: how a run is going, and what it may be asked for."""

import shlex
from typing import Any
from urllib.parse import quote

import gradio as gr

from sdlora import api
from sdlora.api import UserError
from webui.house import HIDDEN, PRIVATE, House, Values, command_line, part, toasts

ASKED = {
    "stop": "It saves and pauses after this step.",
    "save": "It saves after this step.",
    "sample": "It draws its preview after this step.",
}
MOST_STEPS = 1_000_000


class Watch:
    """A run, chosen from all."""

    def __init__(self, house: House) -> None:
        self.house = house
        with gr.Row(equal_height=True):
            self.run = gr.Dropdown([], value=None, label="Run", elem_id="run", scale=3, min_width=220)
            self.pause = gr.Button("Pause", elem_id="pause", elem_classes="beside", scale=1, min_width=90)
            self.sample = gr.Button("Draw now", elem_id="sample-now", elem_classes="beside", scale=1, min_width=100)
            self.save = gr.Button("Save now", elem_id="save-now", elem_classes="beside", scale=1, min_width=100)
        self.body = gr.HTML(part("/live/watch/"), elem_id="watch", padding=False)
        with gr.Accordion("A run that is paused or finished", open=False), gr.Row(equal_height=True):
            self.go_on = gr.Button("Go on", elem_id="go-on", min_width=110)
            self.finish = gr.Button("Make the pack as it is now", elem_id="finish", min_width=160)
            self.further = gr.Number(200, label="steps more", precision=0, minimum=1, maximum=MOST_STEPS, elem_id="further", min_width=110)
            self.extend = gr.Button("Train further", elem_id="extend", min_width=120)
        self.command = command_line(elem_id="watch-cli")
        self.sent = gr.Textbox(elem_id="queue-sent", **HIDDEN)
        self.run.change(self.show, {self.run}, [self.body, self.command], show_progress="hidden", **PRIVATE)
        for button, what in ((self.pause, "stop"), (self.sample, "sample"), (self.save, "save")):
            button.click(lambda values, what=what: self.ask(values, what), {self.run}, [self.command], show_progress="hidden", **PRIVATE)
        for button in (self.go_on, self.finish, self.extend):
            more = {self.run, self.further}
            button.click(
                getattr(self, {self.go_on: "again", self.finish: "end", self.extend: "longer"}[button]), more, [self.command], **PRIVATE
            )
        self.sent.submit(self.take_out, {self.sent}, [self.body], show_progress="hidden", **PRIVATE)

    def choices(self, wanted: str = "", before: str = "") -> Any:
        """The list of runs; the one wanted, else the one before, else the newest is chosen."""
        projects = self.house.projects
        waiting = [one.out.relative_to(projects.root).as_posix() for one in api.queued(projects.root) if one.state != "failed"]
        ids = list(dict.fromkeys([*(projects.id_of(one) for one in projects.runs()), *waiting, *([wanted] if wanted else [])]))
        value = next((one for one in (wanted, before, *ids[:1]) if one in ids), None)
        return gr.Dropdown(ids, value=value)

    def show(self, values: Values) -> Values:
        chosen = values[self.run] or ""
        return {self.body: part(f"/live/watch/{quote(chosen)}"), self.command: self._words(chosen, "run", "watch")}

    def ask(self, values: Values, what: str) -> Values:
        """Lay the request into the run's folder."""
        with toasts():
            one = self.house.projects.run(values[self.run] or "")
            if one.state != "running":
                raise UserError("E-UI-14", f"this run is not training now, it is {one.state}", one.name, "go on with it first")
            api.ask(one.folder, what)
        gr.Info(ASKED[what])
        return {self.command: shlex.join(["touch", str(one.folder / what)])}

    def again(self, values: Values) -> Values:
        return self._enqueue(values, lambda _, steps: steps)

    def end(self, values: Values) -> Values:
        return self._enqueue(values, lambda done, _: done)

    def longer(self, values: Values) -> Values:
        more = int(values[self.further] or 0)
        return self._enqueue(values, lambda _, steps: min(MOST_STEPS, steps + max(1, more)))

    def take_out(self, values: Values) -> Values:
        with toasts():
            api.take_out(self.house.projects.root, values[self.sent] or "")
        return {self.body: gr.skip()}

    def _enqueue(self, values: Values, steps: Any) -> Values:
        """The run once more, up to another step."""
        with toasts():
            one = self.house.projects.run(values[self.run] or "")
            if one.state == "running" or not one.step:
                raise UserError("E-UI-14", "this run is training now, or has not begun", one.name, "pause it first")
            count = steps(one.step, one.steps)
            table = api.read_settings(one.folder / "config.toml", [f"train.steps={count}"])
            self.house.easel.rest()
            api.enqueue(self.house.projects.root, api.settle(table, one.folder), one.folder)
        return {self.command: shlex.join(["sdlora", "resume", str(one.folder), "--set", f"train.steps={count}"])}

    def _words(self, id: str, *verb: str) -> str:
        return shlex.join(["sdlora", *verb, str(self.house.projects.root / id)]) if id else ""
