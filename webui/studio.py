"""The studio's page: choose a pack, move its scale, and see base and adapter on one seed."""

import json
import re
import shlex
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdlora.api import UserError
from webui.easel import NONE, SCALES, STRIP, Choice, Easel, Pair, Wish
from webui.house import PRIVATE, Values, brought, toasts
from webui.links import Links

SNAPS = (-1, 0, 0.5, 1, 1.5, 2)
MORE = 2
"""Further packs that may be drawn with the first."""
FAINT = 2.0
"""Levels of 255 on average, below which nobody sees a difference."""
STRONG = 40.0
GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}
SHA_DIGITS = 12
TITLE = '<p class="lead">Draw with a pack you trained, and move its scale: left the base, right the pack, on one seed.</p>'
BASE = '<code style="white-space: nowrap">--base</code>'
TINY = f"<code>tiny</code> draws 64 px icons: it shows that everything works. For real pictures train with {BASE}."


class Page:
    """The components of the page and what happens when they are used; made inside `gr.Blocks`."""

    def __init__(self, easel: Easel, opened: Any, links: Links) -> None:
        """`opened` is the event at which the packs are listed: nothing is loaded for whoever does not come here."""
        self.easel, self.links = easel, links
        gr.HTML(TITLE, padding=False)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=4, min_width=320):
                self.controls = self._controls()
            with gr.Column(scale=6, min_width=320):
                self._pictures()
        self.chosen = gr.State(None)  # the `Choice` that the controls were last set to
        self.drawn = gr.State(False)  # whether there is a picture to draw again when the scale moves
        self._events(opened)

    def _controls(self) -> dict[str, Any]:
        """The left column; what is returned has a component for each field of `Wish`."""
        with gr.Row(equal_height=True):
            pack = gr.Dropdown([], value=None, label="Pack", elem_id="pack", scale=1, min_width=200)
            self.refresh = gr.Button("Refresh", elem_id="refresh", elem_classes="beside", scale=0, min_width=92)
        self.hint = gr.HTML(elem_id="hint", padding=False)
        self.chip = gr.Button("", elem_id="chip", size="sm", visible=False)
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
        with gr.Row(elem_classes="snaps"):
            self.snaps = [gr.Button(f"{snap:g}".replace("-", "−"), size="sm", elem_id=f"snap-{snap:g}".replace(".", "-")) for snap in SNAPS]
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=130)
            self.make_strip = gr.Button("Strip of scales", elem_id="make-strip", min_width=130)
        with gr.Accordion("Text encoder, further packs", open=False, elem_id="more"):
            with gr.Row():
                self.apart = gr.Checkbox(False, label="another scale in the text encoder", elem_id="apart", min_width=150)
                self.text = gr.Slider(*SCALES, 1, step=0.05, label="Scale in the text encoder", elem_id="text-scale", min_width=150)
            self.more = []
            for number in range(1, MORE + 1):
                with gr.Row():
                    other = gr.Dropdown(
                        [("none", NONE)], value=NONE, label=f"Pack {number + 1}", elem_id=f"pack-{number + 1}", min_width=150
                    )
                    self.more.append(
                        (other, gr.Slider(*SCALES, 1, step=0.05, label="Its scale", elem_id=f"scale-{number + 1}", min_width=150))
                    )
        self.restore = gr.File(label="Drop a picture here to take up its recipe", file_types=[".png"], height=150, elem_id="restore")
        return {"pack": pack, "prompt": prompt, "negative": negative, "seed": seed, "steps": steps,
                "guidance": guidance, "size": size, "scale": scale}  # fmt: skip

    def _pictures(self) -> None:
        """The right column."""
        self.compare = gr.ImageSlider(
            label="Base | adapter", elem_id="compare", type="filepath", interactive=False, buttons=["fullscreen"], max_height=640
        )
        with gr.Row(equal_height=True):
            self.meter = gr.HTML(elem_id="meter", padding=False)
            self.measure = gr.Button("Did it learn?", elem_id="measure", size="sm", scale=0, min_width=130, interactive=False)
        self.learnt = gr.HTML(elem_id="learnt", padding=False)
        self.status = gr.HTML(elem_id="status", padding=False)
        self.kept = gr.HTML(elem_id="strip-kept", padding=False)
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
                    label="The same picture on the command line",
                    elem_id="cli",
                    elem_classes="command",
                    lines=3,
                    max_lines=8,
                    interactive=False,
                    buttons=["copy"],
                )
                self.download = gr.DownloadButton("Download PNG", elem_id="download", interactive=False, size="md")

    def _events(self, opened: Any) -> None:
        """Who calls what. Everything that draws waits in one line, and moves of the scale that were overtaken are skipped."""
        pack, scale = self.controls["pack"], self.controls["scale"]
        lists = self.lists()
        asked = {*self.controls.values(), *(one for pair in self.more for one in pair), self.apart, self.text, self.chosen, self.drawn}
        set_by = [self.controls[name] for name in ("prompt", "guidance", "size", "scale")]
        chosen = [self.chosen, self.hint, self.make_strip, self.measure, self.chip, self.kept, self.learnt, *set_by]
        drawn = [self.compare, self.picture, self.download, self.status, self.meter, self.command, self.drawn]
        busy: dict[str, Any] = {"show_progress_on": [self.compare], **GPU, **PRIVATE}
        quiet = {**busy, "show_progress": "minimal"}
        hidden: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
        listed = gr.on([opened, self.refresh.click], self.list_packs, {*lists}, lists, **hidden)
        for event in (pack.change, listed.success):  # `change` hears the list, the mouse and the keyboard, each once
            event(self.choose, asked, chosen, show_progress_on=[self.hint], **PRIVATE).success(self.redraw, asked, drawn, **quiet)
        gr.on([self.generate.click, self.controls["prompt"].submit], self.draw, asked, drawn, **busy)
        apart = (self.apart, self.text)
        moved = [one.change for one in (scale, *apart, *(one for pair in self.more for one in pair))]  # `release` hears no keyboard
        gr.on(moved, self.redraw, asked, drawn, trigger_mode="always_last", **quiet)
        for button, snap in zip(self.snaps, SNAPS, strict=True):
            button.click(lambda snap=snap: snap, None, [scale], **hidden)
        self.chip.click(self.call, asked, [self.controls["prompt"]], **hidden)
        self.make_strip.click(self.draw_strip, asked, [self.strip, self.kept], **GPU, **PRIVATE)
        self.strip.select(self.take_scale, None, [scale], **PRIVATE).then(self.draw, asked, drawn, **quiet)
        self.measure.click(self.measured, asked, [self.learnt], **GPU, **PRIVATE)
        restored = [*self.controls.values(), *apart, *(one for pair in self.more for one in pair)]
        self.restore.upload(self.take_recipe, {self.restore, pack}, [self.restore, *restored], **PRIVATE).success(
            self.draw, asked, drawn, **busy
        )

    def lists(self) -> list[Any]:
        """The components that list packs, that of the first one first."""
        return [self.controls["pack"], *(other for other, _ in self.more)]

    def list_packs(self, values: Values) -> Values:
        """Read the folder again; the choice stays if it is still there, else the newest pack is chosen."""
        pack = self.controls["pack"]
        ids = [found.id for found in self.easel.shelf.packs()]
        kept = values[pack] if values[pack] in [NONE, *ids] else next(iter(ids), NONE)
        others = {
            other: gr.Dropdown([("none", NONE), *ids], value=values[other] if values[other] in ids else NONE) for other, _ in self.more
        }
        return {pack: gr.Dropdown([("none: the base alone", NONE), *ids], value=kept), **others}

    def choose(self, values: Values) -> Values:
        """Set the controls to what suits the pack, as far as the user's own settings don't stand against it."""
        wish, before = self._wish(values), values[self.chosen]
        busy = self.easel.busy()
        if busy:
            said = f"The studio rests while {escape(busy)} is training. <b>Draw now</b> on the page Watch asks the run for a picture."
            return {self.chosen: before, self.hint: f"<p>{said}</p>"}
        with toasts():
            now = self.easel.choose(wish.pack)
        with_pack = now.pack != NONE
        told: Values = {
            self.chosen: now,
            self.hint: hint(now, str(self.easel.shelf.root)),
            self.make_strip: gr.Button(interactive=with_pack),
            self.measure: gr.Button(interactive=with_pack),
            self.chip: gr.Button(f"+ {now.trigger}", visible=bool(now.trigger)),
        }
        if not before or before.pack != now.pack:  # else the list was only read again
            told |= {self.kept: "", self.learnt: ""}  # they are another pack's
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
            self.meter: meter(pair, wish),
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
        kept = [[scale, self.links.to(picture.path)] for picture, scale in zip(pictures, STRIP, strict=True)]
        return {
            self.strip: gr.Gallery(captioned, label=f"Strip: {wish.prompt[:60]}, seed {wish.seed}", visible=True),
            self.kept: f'<span data-strip="{escape(json.dumps(kept))}"></span>',
        }

    def measured(self, values: Values) -> str:
        """What the pack has learnt of its own pictures; one that does nothing is an error."""
        with toasts():
            found = self.easel.learnt(self._wish(values))
        return f'<p role="status" class="{"good" if found.much else "warn"}">{escape(found.words)}</p>'

    def call(self, values: Values) -> str:
        """The prompt with the trigger in it."""
        wish, chosen = self._wish(values), values[self.chosen]
        trigger = chosen.trigger if chosen else ""
        return wish.prompt if not trigger or trigger in wish.prompt else f"{trigger}, {wish.prompt}".strip(", ")

    def take_recipe(self, values: Values) -> Values:
        """Set the controls as a picture says it was made."""
        with toasts():
            recipe = recipe_of(brought(values[self.restore], self.easel.folder.parent))
        packs, text = [*recipe["scales"], *[("", 0.0)] * (1 + MORE)][: 1 + MORE], dict(recipe.get("text_scales", []))
        own = self.controls["pack"], self.controls["scale"]
        told: Values = {self.restore: None, self.apart: bool(text), self.text: held(text.get(packs[0][0], 1.0))}
        for (pack, scaled), (name, scale) in zip([own, *self.more], packs, strict=True):
            fits = [found.id for found in self.easel.shelf.packs() if found.path.stem.replace(".", "-") == name.rstrip("+")]
            told[pack] = values[own[0]] if pack is own[0] and values[own[0]] in fits else next(iter(fits), NONE)
            told[scaled] = held(scale)
        for key in ("prompt", "negative", "seed", "steps", "guidance"):
            told[self.controls[key]] = recipe[key]
        size = f"{recipe['width']}x{recipe['height']}"
        told[self.controls["size"]] = gr.Dropdown([(size.replace("x", " × "), size)], value=size)
        return told

    def take_scale(self, event: gr.SelectData) -> float:
        """The scale of the picture that was clicked in the strip."""
        return STRIP[event.index]

    def _wish(self, values: Values) -> Wish:
        said = {name: values[control] for name, control in self.controls.items()}
        more = [(values[other] or NONE, round(values[scale], 3)) for other, scale in self.more if values.get(other)]
        said |= {"more": tuple(more), "text_scale": round(values[self.text], 3) if values.get(self.apart) else None}
        said |= {"pack": said["pack"] or NONE, "size": said["size"] or ""}
        said |= {"prompt": said["prompt"] or "", "negative": said["negative"] or ""}  # an empty list says None
        return Wish(**said | {"steps": round(said["steps"]), "scale": round(said["scale"], 3)})  # what is typed may be finer


def held(scale: float) -> float:
    """A scale within the slider's ends."""
    return min(max(float(scale), SCALES[0]), SCALES[1])


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
        text = "" if wish.text_scale is None else f" (text encoder {wish.text_scale:g})"
        parts.append(f"scale {wish.scale:g}{text}: {pair.adapter.sha256[:SHA_DIGITS]}")
        if wish.scale == 0 and pair.adapter.sha256 == pair.base.sha256:
            parts.append("identical to the base, bit for bit")
    if pair.cut:
        parts.append("the base does not read the end of so long a prompt")
    return f'<p role="status">{" | ".join(parts)}</p>'


def meter(pair: Pair, wish: Wish) -> str:
    """How far the pack moves the picture, as HTML: "did it learn?" at a glance."""
    if not wish.pack or not wish.scale:
        return ""
    said = "the pack hardly changes this picture" if pair.apart < FAINT else "the pack changes this picture"
    advice = ": train longer, say its trigger, or raise the scale" if pair.apart < FAINT else ""
    bar = f'<meter max="{STRONG:g}" low="{FAINT:g}" optimum="{STRONG:g}" value="{min(pair.apart, STRONG):.1f}"></meter>'
    return f"<p>{bar} {said} by {pair.apart:.1f} of 255 levels on average{advice}</p>"


def recipe_of(path: Path) -> dict[str, Any]:
    """The recipe inside a PNG. Raises `UserError` if there is none that could be drawn."""
    kinds = {
        "prompt": str,
        "negative": str,
        "seed": int,
        "steps": int,
        "guidance": int | float,
        "width": int,
        "height": int,
        "scales": list,
    }
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            found = json.loads(picture.info.get("sdlora", ""))
        sound = all(isinstance(found[key], kind) for key, kind in kinds.items())
        scales = [*found["scales"], *found.get("text_scales", [])]
        sound = sound and all(isinstance(name, str) and -4 <= float(scale) <= 4 for name, scale in scales)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, Image.DecompressionBombError):
        sound = False
    if not sound:
        raise UserError(
            "E-UI-15", "this picture holds no recipe of sdlora", path.name, "drop a PNG that was drawn here or by `sdlora generate`"
        )
    return dict(found)
