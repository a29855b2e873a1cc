"""The screen Goal: what is to be learnt, on which base and how faithfully; all settings in three depths; and the start."""

import shlex
from typing import Any

import gradio as gr

from sdlora import api
from sdlora.api import UserError
from webui import live
from webui.form import Form, written
from webui.house import PRIVATE, House, Values, command_line, toasts
from webui.projects import Project

KNOB = {"most flexible": (0.6, 0.5), "flexible": (0.8, 0.5), "in between": (1.0, 1.0), "faithful": (1.25, 1.0), "most faithful": (1.5, 2.0)}
"""What each place of the knob makes of the usual number of steps, and of the usual rank."""
MIDDLE = "in between"
STEPS, RANK = "train.steps", "adapter.rank@lora"


class Goal:
    """What a project is to become."""

    def __init__(self, house: House, project: Any) -> None:
        self.house, self.project, self.form = house, project, Form()
        gr.HTML('<p class="lead">Say what is to be learnt; everything else has a default that suits it.</p>', padding=False)
        with gr.Row(elem_classes="split"):
            self.kind = gr.Radio(
                [("a character or thing", "character"), ("a style", "style")], value="character", label="What is learnt", elem_id="kind"
            )
            self.base = gr.Dropdown(
                ["tiny"], value="tiny", allow_custom_value=True, label="Base model", elem_id="base",
                info="tiny is the small one inside, to see that all works; else a hub id, or a model below the data folder",
            )  # fmt: skip
            self.trigger = gr.Textbox(
                label="Word that calls it up", elem_id="trigger", info="left empty: the project's name", max_length=100
            )
        self.knob = gr.Radio(
            [*KNOB], value=MIDDLE, label="Faithful or flexible", elem_id="knob",
            info="Faithful looks more like the pictures; flexible obeys other prompts better. It sets train.steps and adapter.rank below.",
        )  # fmt: skip
        self.takes = gr.HTML(elem_id="takes", padding=False)
        with gr.Row():
            self.start = gr.Button("Start training", variant="primary", elem_id="start", min_width=150)
            self.estimate = gr.Button("What will it take?", elem_id="estimate", min_width=150)
            self.save = gr.Button("Only keep the settings", elem_id="save", min_width=150)
        with gr.Accordion("Tune: the settings that matter most", open=False, elem_id="tune"):
            self.form.tune()
        with gr.Accordion("All settings", open=False, elem_id="all"):
            gr.HTML('<p class="lead">Each box shows what is usual; what you leave empty stays so.</p>', padding=False)
            self.form.everything()
        self.command = command_line(elem_id="goal-cli")
        self.asked = {project, self.kind, self.base, self.trigger, *self.form.controls.values()}
        boxes = [self.form.controls[STEPS], self.form.controls[RANK]]
        self.knob.input(self.turn, self.asked | {self.knob}, boxes, show_progress="hidden", **PRIVATE)
        gr.on(
            [self.kind.input, self.base.input],
            self.usual_again,
            self.asked,
            [*self.form.controls.values()],
            show_progress="hidden",
            **PRIVATE,
        )
        self.save.click(self.keep, self.asked, [self.command], **PRIVATE)
        self.estimate.click(self.tell, self.asked, [self.takes, self.command], **PRIVATE)

    def show(self, name: str) -> Values:
        """The settings of another project."""
        if not name:
            return {}
        project = self.house.projects.find(name)
        table = project.table()
        totals, usual = project.ledger().get("totals", {}), self._usual(table)
        steps = table.get("train", {}).get("steps") or usual.get("train", {}).get("steps")
        return {
            self.kind: table.get("kind", "character"),
            self.base: gr.Dropdown(self._bases(), value=table.get("base", "tiny")),
            self.trigger: gr.Textbox(value=table.get("trigger", ""), placeholder=name),
            self.knob: MIDDLE,
            self.takes: live.takes(totals) if totals and totals["steps"] == steps else "",
            self.command: shlex.join(self._words(project)),
            **self.form.filled(table, usual),
        }

    def outputs(self) -> list[Any]:
        return [self.kind, self.base, self.trigger, self.knob, self.takes, self.command, *self.form.controls.values()]

    def turn(self, values: Values) -> Values:
        """The knob fills in what it stands for."""
        usual = self._usual(self._table(values))
        more, wider = KNOB[values[self.knob]]
        steps, rank = usual.get("train", {}).get("steps"), usual.get("adapter", {}).get("rank")
        shown = [
            written(round(steps * more)) if steps and more != 1 else "",
            written(max(1, round(rank * wider))) if rank and wider != 1 else "",
        ]
        return {self.form.controls[STEPS]: gr.Textbox(value=shown[0]), self.form.controls[RANK]: gr.Textbox(value=shown[1])}

    def usual_again(self, values: Values) -> Values:
        """Another kind or base has other defaults."""
        with toasts():
            table = self._table(values)
            self.house.projects.check_paths(table)
        return self.form.filled(table, self._usual(table))

    def keep(self, values: Values) -> Values:
        with toasts():
            project = self._kept(values)
        return {self.command: shlex.join(self._words(project))}

    def tell(self, values: Values) -> Values:
        """Memory and time of the run as it stands."""
        with toasts():
            project = self._kept(values)
            found = project.look()
        return {self.takes: live.takes(found["totals"]), self.command: shlex.join(self._words(project))}

    def begin(self, values: Values) -> str:
        """Let the run wait for its turn, which comes at once if no other has it; returns its id. The studio makes room for it."""
        with toasts():
            project = self._kept(values)
            run = api.settle(project.table(), project.settings)
            out = self.house.projects.next_run(project)
            self.house.easel.rest()
            api.enqueue(self.house.projects.root, run, out)
        return out.relative_to(self.house.projects.root).as_posix()

    def _kept(self, values: Values) -> Project:
        project = self.house.projects.find(values[self.project] or "")
        table = self._table(values)
        self.house.projects.check_paths(table)
        table.setdefault("data", {})["folder"] = str(project.pictures)
        project.keep({"name": project.name, **table})
        return project

    def _table(self, values: Values) -> dict[str, Any]:
        with toasts():
            table = self.form.table(values)
        said: dict[str, Any] = {
            "name": values[self.project],
            "kind": values[self.kind],
            "base": (values[self.base] or "tiny").strip(),
            "trigger": (values[self.trigger] or "").strip(),
        }
        return {**{key: value for key, value in said.items() if value}, **table}

    def _usual(self, table: dict[str, Any]) -> dict[str, Any]:
        """Every setting as it is where nothing is said; nothing for a base that is not here yet."""
        kinds = {name: {"kind": table[name]["kind"]} for name in ("adapter", "objective", "optimizer") if "kind" in table.get(name, {})}
        said: dict[str, Any] = {key: table[key] for key in ("name", "kind", "base", "trigger") if table.get(key)}
        try:
            return api.settle({"name": "x", **said, **kinds}).model_dump()
        except UserError:
            return {}

    def _bases(self) -> list[str]:
        """The embedded base, and what was named before."""
        known = [str(project.table().get("base", "tiny")) for project in self.house.projects.all()]
        return list(dict.fromkeys(["tiny", *known]))

    def _words(self, project: Project) -> list[str]:
        return ["sdlora", "train", "--config", str(project.settings), "--out", str(self.house.projects.next_run(project))]
