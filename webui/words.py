"""The screen Captions: what is said of each picture, changed one by one or all at once."""

import shlex
from collections import Counter
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from sdlora import api
from sdlora.api import Captioning, Edit, UserError
from webui.house import PRIVATE, House, Values, command_line, toasts
from webui.projects import Project
from webui.recent import Recent

HEADERS = ["picture", "caption", "tokens"]
MOST_TAGS = 60
READ = 75
"""Tokens that a text encoder of the known bases reads at once."""
MOST_COUNTERS = 4


class Words:
    """The captions of a project."""

    def __init__(self, house: House, project: Any) -> None:
        self.house, self.project = house, project
        self.counters: Recent[Callable[[str], int]] = Recent(MOST_COUNTERS)
        gr.HTML(
            '<p class="lead">Say what each picture shows beside the character itself: pose, ground, clothes that change. What is never '
            "said is learnt as part of the name. Click a caption twice to change it.</p>",
            padding=False,
        )
        with gr.Row(elem_classes="split"):
            with gr.Column(scale=5, min_width=320):
                self.table = gr.Dataframe(
                    headers=HEADERS, datatype=["str", "str", "number"], type="array", column_widths=["24%", "64%", "12%"],
                    static_columns=[0, 2], interactive=True, wrap=True, max_height=560, elem_id="captions",
                    show_search="search", max_chars=400,
                )  # fmt: skip
                self.tags = gr.HTML(elem_id="tags", padding=False)
            with gr.Column(scale=3, min_width=260):
                self.picture = gr.HTML(elem_id="captioned", padding=False)
                with gr.Group():
                    self.find = gr.Textbox(label="Find in all captions", elem_id="find", max_length=200)
                    self.replace = gr.Textbox(label="and write instead", elem_id="replace", max_length=200)
                    with gr.Row():
                        self.remove = gr.Textbox(label="Remove a tag", elem_id="remove", max_length=200, min_width=120)
                        self.add = gr.Textbox(label="Add a tag", elem_id="add", max_length=200, min_width=120)
                with gr.Row():
                    self.change = gr.Button("Change all", elem_id="change", variant="primary", min_width=110)
                    self.undo = gr.Button("Undo", elem_id="undo", min_width=110)
                with gr.Accordion("Write the captions that are missing", open=False):
                    self.by = gr.Radio(
                        api.captioners(),
                        value="name",
                        label="By",
                        elem_id="by",
                        info="name: from the files' names; the others download a model once",
                    )
                    self.prefix = gr.Textbox(label="Before each caption", elem_id="prefix", max_length=200)
                    self.write = gr.Button("Write them", elem_id="write", min_width=110)
        self.command = command_line(elem_id="captions-cli")
        shown = [self.table, self.tags, self.command]
        edits = {project, self.find, self.replace, self.remove, self.add}
        self.table.input(self.keep, {project, self.table}, [self.tags], show_progress="hidden", **PRIVATE)
        self.table.select(self.see, {project}, [self.picture], show_progress="hidden", **PRIVATE)
        self.change.click(self.edit, edits, shown, **PRIVATE)
        self.undo.click(self.take_back, {project}, shown, **PRIVATE)
        self.write.click(self.caption, {project, self.by, self.prefix}, shown, **PRIVATE)

    def show(self, name: str) -> Values:
        """The captions of another project."""
        if not name:
            return {self.table: [], self.tags: "", self.command: "", self.picture: ""}
        project = self.house.projects.find(name)
        said = self._said(project)
        count = self._counter(project)
        rows = [[place, caption, count(caption) if count else ""] for place, caption in said.items()]
        words = ["sdlora", "data", "edit", str(project.pictures), "--find", "old", "--replace", "new", "--write"]
        return {self.table: rows, self.tags: tags(list(said.values())), self.command: shlex.join(words), self.picture: ""}

    def keep(self, values: Values) -> Values:
        """Write the captions that were changed in the table."""
        with toasts():
            project = self._project(values)
            before = self._said(project)
            now = {str(row[0]): " ".join(str(row[1] or "").split())[:4000] for row in values[self.table] or []}
            changed = {project.pictures / place: text for place, text in now.items() if place in before and before[place] != text}
            if changed:
                api.put_captions(project.pictures, changed)
        return {self.tags: tags([*(before | {k: v for k, v in now.items() if k in before}).values()])}

    def see(self, values: Values, event: gr.SelectData) -> Values:
        """The picture of the row that was chosen."""
        with toasts():
            project = self._project(values)
            path = project.find(str(event.row_value[0]))
            count = self._counter(project)
        meter = ""
        if count:
            tokens, most = count(self._said(project).get(str(event.row_value[0]), "")), READ * project.chunks
            end = f", the end is not read: {tokens - most} tokens" if tokens > most else ""
            meter = f'<p><meter max="{most}" high="{most - 1}" value="{tokens}"></meter> {tokens} of {most} tokens{end}</p>'
        return {self.picture: f'<img alt="{escape(path.name)}" style="width:100%" src="{self.house.links.to(path, 640)}">{meter}'}

    def edit(self, values: Values) -> Values:
        change = Edit(*(values[one] or "" for one in (self.find, self.replace, self.remove, self.add)))
        with toasts():
            project = self._project(values)
            count = project.edit(change)
        named = {"--find": change.find, "--replace": change.replace, "--remove": change.remove, "--add": change.add}
        words = ["sdlora", "data", "edit", str(project.pictures), *(word for pair in named.items() if pair[1] for word in pair), "--write"]
        gr.Info(f"{count} captions changed")
        return {**self._again(project), self.command: shlex.join(words)}

    def take_back(self, values: Values) -> Values:
        with toasts():
            project = self._project(values)
            count = project.undo()
        gr.Info(f"{count} captions are as before")
        return self._again(project)

    def caption(self, values: Values) -> Values:
        """Let a captioner write what is missing; each caption is on the disk as soon as it is made."""
        by, prefix = values[self.by], values[self.prefix] or ""
        with toasts():
            project = self._project(values)
            _, written = api.caption_folder(project.pictures, Captioning(by, prefix=prefix))
            count = sum(bool(text) for _, text in written)
        gr.Info(f"{count} captions written")
        words = ["sdlora", "data", "caption", str(project.pictures), "--with", by, *(["--prefix", prefix] if prefix else [])]
        return {**self._again(project), self.command: shlex.join(words)}

    def _counter(self, project: Project) -> Callable[[str], int] | None:
        """What says how long a caption is for the project's base; nothing where that base is not here yet."""
        try:
            run = api.settle(project.table(), project.settings)
            key = run.base, run.kind, run.trigger
            counter = self.counters.get(key) or api.token_counter(run)
        except UserError:
            return None
        self.counters.put(key, counter)
        return counter

    def _again(self, project: Project) -> Values:
        shown = self.show(project.name)
        return {one: shown[one] for one in (self.table, self.tags, self.command)}

    def _project(self, values: Values) -> Project:
        return self.house.projects.find(values[self.project] or "")

    def _said(self, project: Project) -> dict[str, str]:
        """Caption by place in the folder."""
        if not project.pictures.is_dir():
            return {}
        return {api.escape_surrogates(path.relative_to(project.pictures).as_posix()): text for path, text in api.captions(project.pictures)}


def tags(captions: list[str]) -> str:
    """How often each tag is said, as HTML."""
    counts = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    shown = "".join(f"<span>{escape(tag[:80])} <b>{count}</b></span>" for tag, count in counts.most_common(MOST_TAGS))
    return f'<p class="lead">What is said how often</p><div class="tags">{shown}</div>' if shown else ""
