"""The parts of the page that follow files: projects, runs, the queue. Each is HTML made of what lies on the disk, and nothing else."""

import time
from html import escape
from pathlib import Path
from threading import Lock
from typing import Any

from sdlora import api
from sdlora.api import Record, UserError
from webui.links import Links
from webui.projects import Project, Projects
from webui.recent import Recent

STATES = {
    "running": "training now",
    "finished": "finished",
    "stopped": "paused",
    "failed": "failed",
    "unreadable": "its settings cannot be read",
    "waiting": "waits for its turn",
}
BADGES = {"used": "used", "fixed": "put right", "warned": "look at this", "left_out": "cannot be used", "aside": "left aside"}
NEWS = ("warning", "failed", "paused")
MOST_NEWS, MOST_ROWS = 5, 12
EMPTY = '<div class="empty"><p>{}</p></div>'


class Live:
    """Makes the parts, each anew only when a file that it shows has changed."""

    def __init__(self, projects: Projects, links: Links) -> None:
        self.projects, self.links = projects, links
        self._kept: Recent[str] = Recent(64)
        self._looked: tuple[float, list[Record]] = (0.0, [])
        self._lock = Lock()

    def home(self) -> str:
        """Cards of all projects, then of all runs."""
        runs, queue = self._runs(), api.queued(self.projects.root)
        waiting = {one.out: one for one in queue}
        cards = [self._project(project) for project in self.projects.all()]
        ran = [self._run(one, one.folder in waiting and waiting[one.folder].state == "waiting") for one in runs]
        first = "".join(cards) or EMPTY.format("No project yet. Begin one above, or try the sample: it trains in minutes on any machine.")
        second = f'<h3>Runs</h3><div class="cards">{"".join(ran)}</div>' if ran else ""
        return f'<h3>Projects</h3><div class="cards">{first}</div>{second}'

    def watch(self, id: str) -> str:
        """How a run is going, and what waits behind it."""
        body = EMPTY.format("Nothing has been trained yet. Choose a project, say what you want on the page Goal, and start.")
        try:
            body = self._watched(self.projects.run(id)) if id else body
        except UserError:
            body = EMPTY.format("The run is about to begin: its pictures are read and the base is loaded.")
        return body + self._queue()

    def choose(self, id: str) -> str:
        """What a judging of a run's checkpoints found, and how far one is that is under way."""
        try:
            folder = self.projects.run(id).folder / api.SCORE if id else None
        except UserError:
            folder = None
        if folder is None:
            return EMPTY.format("Choose a run that has trained.")
        going = next((one for one in reversed(api.queued(self.projects.root)) if one.out == folder), None)
        said = ""
        if going:
            state = {"running": "is judged now"}.get(going.state, STATES[going.state])
            said = f'<p role="status"><span class="badge {going.state}">{state}</span> {escape(going.said)}</p>'
        table = api.read_judged(folder)
        if not table:
            return said or EMPTY.format("Not judged yet. Judging draws each checkpoint at each scale, and says which to use.")

        def take(step: int, scale: float) -> str:
            return f'<button type="button" data-to="choice-sent" data-send="{step}:{scale:g}">Use</button>'

        return said + api.judged_body(table, lambda name: self.links.to(folder / name), take)

    def pictures(self, name: str) -> str:
        """The pictures of a project with what becomes of each."""
        if not name:
            return EMPTY.format("Choose or begin a project first.")
        try:
            project = self.projects.find(name)
        except UserError as error:
            return EMPTY.format(escape(str(error)))
        files = {api.shown(path.relative_to(project.pictures).as_posix()): path for path in project.files()}
        if not files:
            return EMPTY.format("No picture yet. Bring some above: 10 to 30 of a character, more of a style.")
        found = project.ledger()
        rows = {str(row["file"]): row for row in found.get("pictures", [])}
        cards = [self._card(name, path, rows.get(name)) for name, path in files.items()]
        return f'{summary(found, len(files))}<div class="cards">{"".join(cards)}</div>'

    def _runs(self) -> list[Record]:
        """All runs; many pages that ask at once are answered by one look at the disk a second."""
        with self._lock:
            if time.monotonic() - self._looked[0] > 1:
                self._looked = time.monotonic(), self.projects.runs()
            return self._looked[1]

    def _project(self, project: Project) -> str:
        files = [path for path in project.files() if not path.name.startswith(".")]
        said = f"{len(files)} pictures" if files else "no pictures yet"
        return _tile(project.name, said, self.links.to(files[0], 320) if files else "", "project", project.name)

    def _run(self, one: Record, waits: bool) -> str:
        state = "waiting" if waits else one.state
        share = f"step {one.step:,} of {one.steps:,}" if one.steps else ""
        previews = sorted((one.folder / "previews").glob("step-*.png"))
        thumb = next((path for path in (one.folder / "strip.png", *previews[-1:]) if path.is_file()), None)
        said = f'<span class="badge {state}">{STATES[state]}</span> {share}'
        return _tile(self.projects.id_of(one), said, self.links.to(thumb, 640) if thumb else "", "run", self.projects.id_of(one))

    def _card(self, name: str, path: Path, row: dict[str, Any] | None) -> str:
        aside = path.name.startswith(".")
        fate = "aside" if aside else str(row["fate"]) if row else ""
        why = [] if aside or not row else [api.why(code) for code in row["why"]]
        badge = f'<span class="badge {fate}">{BADGES[fate]}</span>' if fate else ""
        said = escape(" / ".join(row["captions"])) if row and "captions" in row and not aside else ""
        reasons = "".join(f"<li>{escape(one)}</li>" for one in why)
        verb = "Take back" if aside else "Leave out"
        crop = _crop(row) if row and not aside and "crop_px" in row else ""
        return (
            f'<article class="card {fate}">{_thumb(self.links.to(path, 320), row, crop)}'
            f"<h4>{escape(name.replace('/.', '/').removeprefix('.'))}</h4>{badge}<p class=said>{said}</p><ul>{reasons}</ul>"
            f'<button type="button" data-to="picture-sent" data-send="{escape(name)}">{verb}</button></article>'
        )

    def _watched(self, one: Record) -> str:
        log = one.folder / "events.jsonl"
        key = one.folder, log.stat().st_mtime_ns, log.stat().st_size, one.state
        with self._lock:
            kept = self._kept.get(key)
        if kept is None:
            kept = self._drawn(one)
            with self._lock:
                self._kept.put(key, kept)
        return kept

    def _drawn(self, one: Record) -> str:
        events, _ = api.events(one.folder)
        share = one.step / one.steps if one.steps else 0.0
        pace = seconds_a_step(events)
        left = f", about {_duration(pace * (one.steps - one.step))} left" if one.state == "running" and pace else ""
        speed = f" · {_duration(pace)} a step" if pace else ""
        loss = f" · loss {one.loss:.4f}" if one.loss is not None else ""
        memory = next((event["data"]["memory_bytes"] for event in reversed(events) if "memory_bytes" in event["data"]), None)
        room = f" · {memory / 1e9:.2f} GB of memory" if isinstance(memory, int) and one.state == "running" else ""
        news = [event["text"] for event in events if event["kind"] in NEWS][-MOST_NEWS:]
        notes = "".join(f"<li>{escape(text)}</li>" for text in news)
        pack = one.pack.relative_to(self.projects.root).as_posix() if one.pack and one.state == "finished" else ""
        see = f'<button type="button" class="see" data-to="open-sent" data-send="pack:{escape(pack)}">See it: move its scale</button>'
        told = [event["text"] for event in events if event["kind"] == "note" and "distance_adapter" in event["data"]]
        learnt = told[-1] if told else ""
        return (
            f'<div class="head"><h3>{escape(one.name)}</h3><span class="badge {one.state}">{STATES[one.state]}</span></div>'
            f'<progress max="1" value="{share:.4f}" aria-label="steps done"></progress>'
            f'<p role="status">step {one.step:,} of {one.steps:,}{left}{speed}{loss}{room}</p>'
            f"{see if pack else ''}{f'<p><b>{escape(learnt)}</b></p>' if learnt else ''}{f'<ul class=news>{notes}</ul>' if notes else ''}"
            f"{self._previews(one, events)}{api.curves(one.folder)}"
        )

    def _previews(self, one: Record, events: list[dict[str, Any]]) -> str:
        """Pictures by step, one row each with the base as the first; the prompts stand above."""
        latest = {event["step"]: str(event["data"].get("file", "")) for event in events if event["kind"] == "preview"}
        steps = sorted(latest)
        kept = [*steps[:1], *steps[1:][-MOST_ROWS:]]
        rows = ""
        for step in kept:
            address = self.links.to(one.folder / latest[step]) if latest[step].startswith("previews/") else ""
            label = f"step {step:,}" if step else "the base"
            rows += f'<tr><th scope="row">{label}</th><td><img alt="preview, {label}" src="{address}"></td></tr>' if address else ""
        try:
            prompts = api.read_settings(one.folder / "config.toml", []).get("preview", {}).get("prompts", [])
        except UserError:
            prompts = []
        said = "".join(f"<span>{escape(str(prompt))}</span>" for prompt in prompts)
        return f'<table class="previews"><tr><td></td><td><div class="prompts">{said}</div></td></tr>{rows}</table>' if rows else ""

    def _queue(self) -> str:
        queue = api.queued(self.projects.root)
        lines = "".join(
            f'<li><b>{escape(one.name)}</b> <span class="badge {one.state}">{STATES[one.state]}</span> {escape(one.said)} '
            + (
                ""
                if one.state == "running"
                else f'<button type="button" data-to="queue-sent" data-send="{escape(one.id)}">Take out</button>'
            )
            + "</li>"
            for one in queue
        )
        return f'<h3>Queue</h3><ul class="queue">{lines}</ul>' if lines else ""


def summary(found: dict[str, Any], count: int) -> str:
    """What a ledger says in sum, with what it finds of the set as a whole."""
    if not found:
        return f"<p>{count} pictures, not looked at yet.</p>"
    totals = found["totals"]
    said = (
        f"{totals['found']} pictures: {totals['used']} are used ({totals['of_these_fixed']} put right, {totals['of_these_warned']} worth a "
        f"look), {totals['left_out']} cannot be."
    )
    notes = "".join(f"<li>{escape(one['detail'])}. {escape(api.why(one['code']))}</li>" for one in found["findings"] if not one["files"])
    return f"<p>{said}</p><ul class=news>{notes}</ul>"


def takes(totals: dict[str, Any]) -> str:
    """What a run will take, as HTML."""
    memory = totals["memory_bytes"]["total"] / 1e9
    seconds = totals["seconds"]
    time_said = (
        f"about <b>{_duration(seconds)}</b> of training" if seconds else "a time that is known once a run of this kind was made here"
    )
    return (
        f"<p>{totals['steps']:,} steps, in which each picture is seen {totals['epochs']:g} times: about <b>{memory:.2f} GB</b> of memory "
        f"beside the libraries, {totals['disk_bytes'] / 1e6:.1f} MB on the disk, {time_said}.</p>"
    )


def seconds_a_step(events: list[dict[str, Any]]) -> float:
    """Of the last steps that were told; 0 while it is not known."""
    told = [(event["step"], event["time"]) for event in events if event["kind"] == "step"][-200:]
    if len(told) < 2 or told[-1][0] <= told[0][0]:
        return 0.0
    return float(max(0.0, (told[-1][1] - told[0][1]) / (told[-1][0] - told[0][0])))


def _tile(title: str, said: str, image: str, what: str, name: str) -> str:
    return (
        f'<button type="button" class="card tile {what}" data-to="open-sent" data-send="{what}:{escape(name)}">'
        f"{_thumb(image)}<h4>{escape(title)}</h4><p>{said}</p></button>"
    )


def _thumb(image: str, row: dict[str, Any] | None = None, over: str = "") -> str:
    """A small picture whole in a square, with what lies over it."""
    width, height = row["size_px"] if row and "size_px" in row else (1, 1)
    long = "width:100%" if width >= height else "height:100%"
    shown = f'<img loading="lazy" alt="" src="{image}">{over}' if image else ""
    return f'<div class="thumb"><span class="frame" style="aspect-ratio:{width}/{height};{long}">{shown}</span></div>'


def _crop(row: dict[str, Any]) -> str:
    """The part of a picture that is trained on, where that is not all of it, as a frame over it."""
    (width, height), (left, top, right, bottom) = row["size_px"], row["crop_px"]
    if min(left, top) < 1 and right > width - 1 and bottom > height - 1:
        return ""
    place = f"left:{left / width:.1%};top:{top / height:.1%};width:{(right - left) / width:.1%};height:{(bottom - top) / height:.1%}"
    return f'<i class="crop" style="{place}" title="this part is trained on"></i>'


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
