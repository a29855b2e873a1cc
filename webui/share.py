"""The screen Share: what a pack tells, who opens it, what stands beside it; as a ZIP, to the hub, and from others."""

import os
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora import api
from sdlora.api import Push, Reading, UserError
from webui.house import PRIVATE, House, Values, brought, command_line, toasts

FIELDS = {"title": "Title", "author": "Author", "license": "Licence", "tags": "Tags", "description": "Description"}
"""What may be written into a pack's header, beside its trigger and scale: ModelSpec's names, and what they are called here."""
RECEIVED = "received"
SHOWN = 2000
"""Characters of a field that a box shows; what is longer is left as it is unless it is written anew."""
LEAD = '<p class="lead">Hand a pack on: everything that becomes public is listed here first. Nothing is sent before you press Send.</p>'


class Share:
    """A pack, chosen from all, on its way to others; and others' packs on theirs."""

    def __init__(self, house: House, opened: Any) -> None:
        """`opened` is the event at which the packs are listed."""
        self.house = house
        gr.HTML(LEAD, padding=False)
        with gr.Row(equal_height=True):
            self.pack = gr.Dropdown([], value=None, label="Pack", elem_id="share-pack", scale=1, min_width=220)
            self.bundle = gr.Button(
                "Make a bundle", variant="primary", elem_id="make-bundle", elem_classes="beside", scale=0, size="md", min_width=180
            )
            self.download = gr.DownloadButton(
                "Download", elem_id="bundle", elem_classes="beside", interactive=False, size="md", scale=0, min_width=190
            )
        self.readers = gr.HTML(elem_id="readers", padding=False)
        self.public = gr.HTML(elem_id="public", padding=False)
        with gr.Accordion("What it says of itself", open=False, elem_id="facts"):
            with gr.Row():
                self.trigger = gr.Textbox(label="Trigger", elem_id="fact-trigger", max_length=200, min_width=150)
                self.scale = gr.Number(1, label="Recommended scale", elem_id="fact-scale", minimum=-4, maximum=4, min_width=130)
                self.fields = {name: gr.Textbox(label=label, elem_id=f"fact-{name}", max_length=SHOWN, min_width=150)
                               for name, label in FIELDS.items()}  # fmt: skip
            self.write = gr.Button("Write it into the pack", elem_id="write-facts", size="sm")
        with gr.Accordion("To the hub", open=False, elem_id="hub"):
            with gr.Row(equal_height=True):
                self.repository = gr.Textbox(label="Repository", placeholder="owner/name", elem_id="repository", max_length=200)
                self.private = gr.Checkbox(True, label="visible to me alone", elem_id="private", min_width=140)
                self.dry = gr.Button("Show what would be sent", elem_id="dry-run", elem_classes="beside", scale=0, size="md", min_width=250)
                self.send = gr.Button("Send", elem_id="send", elem_classes="beside", interactive=False, scale=0, size="md", min_width=90)
            self.sending = gr.HTML(elem_id="sending", padding=False)
        with gr.Accordion("Open somebody's pack", open=False, elem_id="receive"):
            self.received = gr.File(label="Drop a .safetensors file or a bundle", file_types=[".safetensors", ".zip"], height=120,
                                    elem_id="received")  # fmt: skip
            self.told = gr.HTML(elem_id="told", padding=False)
        self.command = command_line(elem_id="share-cli")
        self.shown = gr.State(None)  # pack, repository and privacy that the last dry run was of
        self._events(opened)

    def _events(self, opened: Any) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
        facts = [self.trigger, self.scale, *self.fields.values()]
        looked = [self.readers, self.public, self.download, self.send, self.sending, self.command, *facts]
        opened(self.list_packs, {self.pack}, [self.pack], **quiet).success(self.look, {self.pack}, looked, **PRIVATE)
        self.pack.input(self.look, {self.pack}, looked, **PRIVATE)
        self.bundle.click(self.make, {self.pack}, [self.download, self.command], **PRIVATE)
        self.write.click(self.describe, {self.pack, *facts}, [*looked], **PRIVATE)
        wanted = {self.pack, self.repository, self.private, self.shown}
        self.dry.click(self.rehearse, wanted, [self.sending, self.send, self.shown, self.command], **PRIVATE)
        self.send.click(self.go, wanted, [self.sending, self.send, self.command], **PRIVATE)
        self.received.upload(self.take, {self.received, self.pack}, [self.received, self.told, self.pack, self.command], **PRIVATE)

    def list_packs(self, values: Values) -> Values:
        """Read the folder again; the choice stays if it is still there, else the newest pack is chosen."""
        ids = [found.id for found in self.house.easel.shelf.packs()]
        return {self.pack: gr.Dropdown(ids, value=values[self.pack] if values[self.pack] in ids else next(iter(ids), None))}

    def look(self, values: Values) -> Values:
        """All that is to be known of a pack before it is handed on."""
        if not values[self.pack]:
            return {self.readers: "<p>There is no pack yet: train one, or open somebody's.</p>", self.command: ""}
        with toasts():
            path = self._path(values)
            about, pack = api.about_pack(path), api.open_pack(path)
            try:
                readings = table(api.check_pack(path))
            except UserError as error:
                readings = f"<p>Who opens it cannot be told: {escape(str(error))}</p>"
        told: Values = {self.readers: readings, self.public: becomes_public(path, pack.metadata), self.sending: ""}
        told |= {self.download: gr.DownloadButton(interactive=False), self.send: gr.Button(interactive=False)}
        told |= {self.trigger: about["trigger"], self.scale: about["scale"]}
        told |= {field: about[name][:SHOWN] for name, field in self.fields.items()}
        return {**told, self.command: shlex.join(["sdlora", "pack", "check", str(path)])}

    def make(self, values: Values) -> Values:
        """A bundle as a ZIP, to be downloaded."""
        with toasts():
            path = self._path(values)
            out = self.house.easel.folder.parent / "bundles" / f"{path.stem}.zip"
            api.bundle_pack(path, out)
        said = shlex.join(["sdlora", "pack", "bundle", str(path), "--out", out.name])
        return {self.download: gr.DownloadButton(f"Download {out.name}", value=str(out), interactive=True), self.command: said}

    def describe(self, values: Values) -> Values:
        """Write what was typed into the pack's header; its tensors' bytes stay as they are."""
        with toasts():
            path, before = self._path(values), api.about_pack(self._path(values))
            typed = {name: (values[field] or "").strip() for name, field in self.fields.items()}
            lines = [f"modelspec.{name}={text}" for name, text in typed.items() if text != before[name][:SHOWN].strip()]
            trigger = (values[self.trigger] or "").strip()
            trigger_now = trigger if trigger != before["trigger"] else None
            scale = float(values[self.scale]) if values[self.scale] not in (None, before["scale"]) else None
            changes = api.header_changes(lines, trigger_now, scale)
            if not changes:
                raise UserError("E-UI-17", "nothing is written: this is what the pack says already", path.name, "change a field first")
            api.edit_pack(path, changes)
        words = [word for line in lines for word in ("--set", line)]
        words += ["--trigger", trigger] * (trigger_now is not None) + ["--scale", f"{scale:g}"] * (scale is not None)
        gr.Info("It is written; the weights are untouched.")
        return {**self.look(values), self.command: shlex.join(["sdlora", "pack", "edit", str(path), *words])}

    def rehearse(self, values: Values) -> Values:
        """What would be sent to the hub."""
        with toasts():
            push = self._push(values)
        able = bool(os.environ.get("HF_TOKEN"))
        note = "Nothing was sent." if able else "Nothing was sent, nor can be: the server has no HF_TOKEN in its environment."
        lines = "".join(f"<li>{escape(line)}</li>" for line in push.lines())
        return {
            self.sending: f"<p>{note}</p><ul class=news>{lines}</ul>",
            self.send: gr.Button(interactive=able),
            self.shown: self._wanted(values),
            self.command: shlex.join(self._words(values)),
        }

    def go(self, values: Values) -> Values:
        """Send what was shown, and only that."""
        with toasts():
            if values[self.shown] != self._wanted(values):
                raise UserError("E-UI-18", "this is not what was shown", values[self.repository] or "", "look at what would be sent first")
            address = self._push(values).send()
        said = {self.sending: f"<p>Sent: {escape(address)}</p>", self.send: gr.Button(interactive=False)}
        return {**said, self.command: shlex.join([*self._words(values), "--send"])}

    def take(self, values: Values) -> Values:
        """Somebody's file, looked through, into a folder of its own."""
        with toasts():
            path = brought(values[self.received], self.house.easel.folder.parent)
            out = self.house.projects.root / RECEIVED / path.stem
            number = 2
            while out.exists():
                out, number = out.with_name(f"{path.stem}-{number}"), number + 1
            found = api.take_pack(str(path), out)
        rows = "".join(f"<li>{escape(one['file'])}: {escape(one['kind'])}, for {escape(one['base'] or 'a base that it does not name')}, "
                       f"trigger {escape(one['trigger'] or 'not said')}</li>" for one in found)  # fmt: skip
        listed = self.list_packs({self.pack: (out / found[0]["file"]).relative_to(self.house.projects.root).as_posix()})
        said = shlex.join(["sdlora", "pack", "open", path.name, "--out", str(out)])
        return {self.received: None, self.told: f"<ul class=news>{rows}</ul>", **listed, self.command: said}

    def _path(self, values: Values) -> Path:
        return self.house.easel.shelf.find(values[self.pack] or "").path

    def _wanted(self, values: Values) -> list[Any]:
        found = self.house.easel.shelf.find(values[self.pack] or "")
        return [found.id, *found.stamp, (values[self.repository] or "").strip(), bool(values[self.private])]

    def _push(self, values: Values) -> Push:
        if self.house.projects.listens:
            what = "nothing is sent in your name from a page that others can reach"
            raise UserError("E-UI-06", what, "the hub", "use `sdlora pack push`")
        return api.push_pack(self._path(values), (values[self.repository] or "").strip(), bool(values[self.private]))

    def _words(self, values: Values) -> list[str]:
        public = [] if values[self.private] else ["--public"]
        return ["sdlora", "pack", "push", str(self._path(values)), (values[self.repository] or "").strip(), *public]


def table(readings: Sequence[Reading]) -> str:
    """Who opens a pack, as HTML."""
    rows = []
    for one in readings:
        scale = "" if one.scale is None else " to ".join(dict.fromkeys(f"{value:g}" for value in one.scale))
        why = f"silently: {one.reason}. To mend it: {one.fix}" if one.misread else one.reason
        cells = (one.reader, one.verdict, f"{one.matched} of {one.modules}", scale, why)
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("program", "opens", "modules", "scale", "why"))
    return f"<table class=plain><tr>{head}</tr>{''.join(rows)}</table>"


def becomes_public(path: Path, metadata: dict[str, str]) -> str:
    """All that a pack's file tells, beside its weights, as HTML."""
    level = metadata.get("sdlora.privacy", "not said: another program wrote it")
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(text[:300])}{' ...' if len(text) > 300 else ''}</td></tr>"
                   for key, text in sorted(metadata.items()))  # fmt: skip
    lead = f"What becomes public with <code>{escape(path.name)}</code>: its weights, and these {len(metadata)} fields"
    return f"<details><summary>{lead} (privacy: {escape(level)})</summary><table class=plain>{rows}</table></details>"
