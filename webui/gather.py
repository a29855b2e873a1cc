"""The screens Home and Pictures: begin a project, bring its pictures, and see what becomes of each."""

import shlex
from typing import Any
from urllib.parse import quote

import gradio as gr

from webui.house import HIDDEN, PRIVATE, House, Values, brought, command_line, part, toasts
from webui.projects import SAMPLE

LEAD = '<p class="lead">Teach Stable Diffusion a character or a style from a folder of pictures, and see it work.</p>'


class Home:
    """All projects and runs."""

    def __init__(self, house: House) -> None:
        self.house = house
        gr.HTML(LEAD, padding=False)
        with gr.Row(equal_height=True):
            self.name = gr.Textbox(
                label="Name of a new project", elem_id="new-name", placeholder="mira", max_length=64, scale=3, min_width=200
            )
            self.begin = gr.Button("Begin", variant="primary", elem_id="begin", elem_classes="beside", scale=1, min_width=110)
            self.sample = gr.Button(
                "Try the sample", elem_id="sample", elem_classes="beside", scale=1, min_width=150, interactive=SAMPLE.is_dir()
            )
        gr.HTML(part("/live/home"), elem_id="home", padding=False)
        self.opened = gr.Textbox(elem_id="open-sent", **HIDDEN)


class Gather:
    """The pictures of a project."""

    def __init__(self, house: House, project: Any) -> None:
        self.house, self.project = house, project
        gr.HTML(
            '<p class="lead">Bring the pictures. They are copied: yours stay as they are. Captions in files beside them come along; nested '
            "folders come as a ZIP.</p>",
            padding=False,
        )
        with gr.Row(elem_classes="split", equal_height=True):
            self.files = gr.File(
                label="Drop pictures or a ZIP here", file_count="multiple", elem_id="files", height=150, scale=3, min_width=260,
                file_types=["image", ".txt", ".caption", ".json", ".jsonl", ".csv", ".zip"],
            )  # fmt: skip
            with gr.Column(scale=2, min_width=240):
                self.folder = gr.UploadButton("Choose a folder on your computer", file_count="directory", elem_id="folder")
                self.path = gr.Textbox(
                    label=f"Or a folder below {house.projects.root}", elem_id="path", placeholder="my-pictures", max_length=1000,
                    visible=not house.projects.listens, submit_btn=True,
                )  # fmt: skip
        self.look = gr.Button("Look at the pictures again", elem_id="look", size="sm")
        self.cards = gr.HTML(part("/live/pictures/"), elem_id="pictures", padding=False)
        self.command = command_line(elem_id="pictures-cli")
        self.sent = gr.Textbox(elem_id="picture-sent", **HIDDEN)
        busy = {"show_progress_on": [self.command], **PRIVATE}
        self.files.upload(self.bring, {self.project, self.files}, [self.files, self.cards, self.command], **busy)
        self.folder.upload(self.bring_more, {self.project, self.folder}, [self.cards, self.command], **busy)
        self.path.submit(self.bring_path, {self.project, self.path}, [self.cards, self.command], **busy)
        self.look.click(self.see, {self.project}, [self.cards, self.command], **busy)
        self.sent.submit(self.put_aside, {self.project, self.sent}, [self.cards], show_progress="hidden", **PRIVATE)

    def show(self, name: str) -> Values:
        """The pictures of another project."""
        words = ["sdlora", "check", str(self.house.projects.find(name).pictures)] if name else []
        return {self.cards: part(f"/live/pictures/{quote(name)}"), self.command: shlex.join(words)}

    def bring(self, values: Values) -> Values:
        """Uploaded files; their place on the page is free again."""
        return {self.files: None, **self._bring(values, values[self.files])}

    def bring_more(self, values: Values) -> Values:
        return self._bring(values, values[self.folder])

    def bring_path(self, values: Values) -> Values:
        with toasts():
            project = self.house.projects.find(values[self.project] or "")
            self.house.projects.bring_folder(project, values[self.path] or "")
            project.look()
        return self.show(project.name)

    def see(self, values: Values) -> Values:
        with toasts():
            project = self.house.projects.find(values[self.project] or "")
            project.look()
        return self.show(project.name)

    def put_aside(self, values: Values) -> Values:
        """Leave a picture out, or take it back."""
        with toasts():
            project = self.house.projects.find(values[self.project] or "")
            project.put_aside(values[self.sent] or "")
        return {self.cards: part(f"/live/pictures/{quote(project.name)}")}

    def _bring(self, values: Values, files: Any) -> Values:
        with toasts():
            paths = [brought(path, self.house.easel.folder.parent) for path in files or []]
            project = self.house.projects.find(values[self.project] or "")
            self.house.projects.bring_files(project, paths)
            project.look()
        return self.show(project.name)
