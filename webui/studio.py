"""The studio's page: choose a pack, move its scale, and see base and adapter on one seed."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, TypeAlias

import gradio as gr

from sdlora.api import UserError
from webui.easel import NONE, SCALES, STRIP, Choice, Easel, Pair, Wish

Values: TypeAlias = dict[Any, Any]
"""Values by component: what gradio hands to an event whose inputs are a set, and takes back from it."""

GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}
SHA_DIGITS = 12
TITLE = """<h1>sdlora studio</h1>
<p>Draw with a pack you trained, and move its scale: left the base, right the pack, on one seed.</p>"""
BASE = '<code style="white-space: nowrap">--base</code>'
TINY = f"<code>tiny</code> draws 64 px icons: it shows that everything works. For real pictures train with {BASE}."


class Page:
    """The components of the page and what happens when they are used; made inside `gr.Blocks`."""

    def __init__(self, easel: Easel, page: Any) -> None:
        self.easel = easel
        gr.HTML(TITLE, padding=False, elem_id="title")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=4, min_width=320):
                self.controls = self._controls()
            with gr.Column(scale=6, min_width=320):
                self._pictures()
        self.chosen = gr.State(None)  # the `Choice` that the controls were last set to
        self.drawn = gr.State(False)  # whether there is a picture to draw again when the scale moves
        self._events(page)

    def _controls(self) -> dict[str, Any]:
        """The left column; what is returned has a component for each field of `Wish`."""
        with gr.Row(equal_height=True):
            pack = gr.Dropdown([], value=None, label="Pack", elem_id="pack", scale=1, min_width=200)
            self.refresh = gr.Button("Refresh", elem_id="refresh", scale=0, min_width=92)
        self.hint = gr.HTML(elem_id="hint", padding=False)
        prompt = gr.Textbox(label="Prompt", elem_id="prompt", lines=2, max_length=2000)
        negative = gr.Textbox(label="Negative prompt", elem_id="negative", max_length=2000, placeholder="what to keep away from")
        with gr.Row():
            seed = gr.Number(0, label="Seed", elem_id="seed", precision=0, minimum=0, min_width=130)
            size = gr.Dropdown([], value=None, label="Size", elem_id="size", min_width=170)
        with gr.Row():
            steps = gr.Slider(1, 100, 25, step=1, label="Steps", elem_id="steps", min_width=150)
            guidance = gr.Slider(0, 20, 3, step=0.5, label="Guidance", elem_id="guidance", min_width=150)
        scale = gr.Slider(
            *SCALES, 1, step=0.05, label="Scale of the pack", info="0 is the base, 1 is what was trained", elem_id="scale", interactive=True
        )
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=130)
            self.make_strip = gr.Button("Strip", elem_id="make-strip", min_width=130)
        return {"pack": pack, "prompt": prompt, "negative": negative, "seed": seed, "steps": steps,
                "guidance": guidance, "size": size, "scale": scale}  # fmt: skip

    def _pictures(self) -> None:
        """The right column."""
        self.compare = gr.ImageSlider(
            label="Base | adapter", elem_id="compare", type="filepath", interactive=False, buttons=["fullscreen"], max_height=640
        )
        self.status = gr.HTML(elem_id="status", padding=False)
        self.strip = gr.Gallery(
            label="Strip", elem_id="strip", columns=len(STRIP), height="auto", object_fit="contain", fit_columns=False,
            allow_preview=False, interactive=False, buttons=["download_all"], visible=False,
        )  # fmt: skip
        with gr.Row():
            with gr.Column(scale=2, min_width=160):
                self.picture = gr.Image(
                    label="Adapter", elem_id="picture", type="filepath", interactive=False, buttons=["fullscreen"], show_label=True
                )
            with gr.Column(scale=5, min_width=260):
                self.command = gr.Textbox(
                    label="The same picture on the command line", elem_id="cli", lines=3, max_lines=8, interactive=False, buttons=["copy"]
                )
                self.download = gr.DownloadButton("Download PNG", elem_id="download", interactive=False, size="md")

    def _events(self, page: Any) -> None:
        """Who calls what. Everything that draws waits in one line, and moves of the scale that were overtaken are skipped."""
        pack, scale = self.controls["pack"], self.controls["scale"]
        asked = {*self.controls.values(), self.chosen, self.drawn}
        chosen = [self.chosen, self.hint, self.make_strip, *(self.controls[name] for name in ("prompt", "guidance", "size", "scale"))]
        drawn = [self.compare, self.picture, self.download, self.status, self.command, self.drawn]
        busy: dict[str, Any] = {"show_progress_on": [self.compare], **GPU}
        quiet = {**busy, "show_progress": "minimal"}
        page.load(self.list_packs, {pack}, [pack], show_progress="hidden")
        refreshed = self.refresh.click(self.list_packs, {pack}, [pack], show_progress="hidden")
        for event in (pack.change, refreshed.success):  # `change` hears the list, the mouse and the keyboard, each once
            event(self.choose, asked, chosen, show_progress_on=[self.hint]).success(self.redraw, asked, drawn, **quiet)
        gr.on([self.generate.click, self.controls["prompt"].submit], self.draw, asked, drawn, **busy)
        scale.change(self.redraw, asked, drawn, trigger_mode="always_last", **quiet)  # `release` does not hear the keyboard
        self.make_strip.click(self.draw_strip, asked, [self.strip], **GPU)
        self.strip.select(self.take_scale, None, [scale]).then(self.draw, asked, drawn, **quiet)

    def list_packs(self, values: Values) -> Values:
        """Read the folder again; the choice stays if it is still there, else the newest pack is chosen."""
        pack = self.controls["pack"]
        ids = [found.id for found in self.easel.shelf.packs()]
        kept = values[pack] if values[pack] in [NONE, *ids] else next(iter(ids), NONE)
        return {pack: gr.Dropdown([("none: the base alone", NONE), *ids], value=kept)}

    def choose(self, values: Values) -> Values:
        """Set the controls to what suits the pack, as far as the user's own settings don't stand against it."""
        wish, before = self._wish(values), values[self.chosen]
        with toasts():
            now = self.easel.choose(wish.pack)
        with_pack = now.pack != NONE
        told: Values = {
            self.chosen: now,
            self.hint: hint(now, str(self.easel.shelf.root)),
            self.make_strip: gr.Button(interactive=with_pack),
        }
        if not before or before.pack != now.pack:  # else the list was only read again
            told[self.controls["prompt"]] = called(wish.prompt, before.trigger if before else "", now.trigger)
            told[self.controls["scale"]] = gr.Slider(value=now.scale, interactive=with_pack)
        if not before or before.base != now.base:
            told[self.controls["guidance"]] = now.guidance
            told[self.controls["size"]] = gr.Dropdown(list(now.sizes.items()), value=next(iter(now.sizes.values())))
        return told

    def draw(self, values: Values) -> Values:
        """Base and adapter on one seed."""
        wish = self._wish(values)
        with toasts():
            pair = self.easel.pair(wish)
        base, adapter = str(pair.base.path), str(pair.adapter.path)
        label = f"Base | scale {wish.scale:g}" if wish.pack else "The base alone"
        return {
            self.compare: gr.ImageSlider((base, adapter), label=label),
            self.picture: gr.Image(adapter, label=f"Scale {wish.scale:g}" if wish.pack else "Base"),
            self.download: gr.DownloadButton(value=adapter, interactive=True),
            self.status: status(pair, wish),
            self.command: pair.command,
            self.drawn: True,
        }

    def redraw(self, values: Values) -> Values:
        """As `draw`, if anything has been drawn yet."""
        return self.draw(values) if values[self.drawn] else {self.drawn: False}

    def draw_strip(self, values: Values) -> Values:
        """One seed at every scale."""
        wish = self._wish(values)
        with toasts():
            pictures = self.easel.strip(wish)
        captioned = [(str(picture.path), f"scale {scale:g}") for picture, scale in zip(pictures, STRIP, strict=True)]
        return {self.strip: gr.Gallery(captioned, label=f"Strip: {wish.prompt[:60]}, seed {wish.seed}", visible=True)}

    def take_scale(self, event: gr.SelectData) -> float:
        """The scale of the picture that was clicked in the strip."""
        return STRIP[event.index]

    def _wish(self, values: Values) -> Wish:
        said = {name: values[control] for name, control in self.controls.items()}
        said |= {"pack": said["pack"] or NONE, "size": said["size"] or ""}  # an empty list says None
        return Wish(**said | {"steps": round(said["steps"]), "scale": round(said["scale"], 3)})  # what is typed may be finer


@contextmanager
def toasts() -> Iterator[None]:
    """User errors as a message on the page; it is rendered as HTML, and an error may quote a file."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), duration=15, print_exception=False) from None


def called(prompt: str, before: str, trigger: str) -> str:
    """The prompt when another pack is chosen: its trigger takes the place of the one before, the user's own words stay."""
    if not prompt.strip():
        return trigger
    if not (before and trigger):
        return prompt
    return re.sub(rf"(?<!\w){re.escape(before)}(?!\w)", lambda _: trigger, prompt)


def hint(choice: Choice, root: str) -> str:
    """What the choice means, in a line or two of HTML."""
    base = f"<code>{escape(choice.base)}</code>"
    if choice.trigger:
        told = f"Say <code>{escape(choice.trigger)}</code> in the prompt. Drawn on {base}, recommended scale {choice.scale:g}."
    elif choice.pack:
        told = f"This pack names no trigger. Drawn on {base}, recommended scale {choice.scale:g}."
    else:
        train = f"sdlora train my-pictures --name mira --out {shlex.quote(root)}/mira"
        told = f"The base {base} alone. To have a pack here: <code>{escape(train)}</code>, then Refresh."
    return f"<p>{told}</p>" + (f"<p>{TINY}</p>" if choice.base == "tiny" else "")


def status(pair: Pair, wish: Wish) -> str:
    """Which pictures are shown, by the hash of their RGB bytes, as HTML."""
    parts = [f"base {pair.base.sha256[:SHA_DIGITS]}"]
    if wish.pack:
        parts.append(f"scale {wish.scale:g}: {pair.adapter.sha256[:SHA_DIGITS]}")
        if wish.scale == 0 and pair.adapter.sha256 == pair.base.sha256:
            parts.append("identical to the base, bit for bit")
    if pair.cut:
        parts.append("the base does not read the end of so long a prompt")
    return f'<p role="status">{" | ".join(parts)}</p>'
