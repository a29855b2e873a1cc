"""`report.html`: a run on one page that needs no other file and no network. It is a function of the run folder's files and nothing else."""

import base64
import io
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import tomli_w
from PIL import Image

from sdlora import charts, record, safeio, settings
from sdlora.charts import Series
from sdlora.data import doctor, reasons
from sdlora.errors import UserError

WIDEST_PX = 1600
MOST_ROWS = 20
MOST_FINDINGS = 12
MOST_PREVIEWS = 12
STYLE = Path(__file__).parent / "report.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing but what it holds."""
KEYS = {"dots": "each step", "line": "smoothed", "marks": "validation"}
PHASES = {
    "Reading the pictures, loading the base": "loading",
    "Encoding the pictures": "encoding",
    "Training": "training",
    "Drawing, and writing the pack": "drawing",
}
Row = Sequence[object]


@dataclass(frozen=True)
class Told:
    """Everything that the folder tells."""

    out: Path
    record: record.Record
    log: list[dict[str, Any]]
    settings: dict[str, Any]
    ledger: dict[str, Any]
    environment: dict[str, Any]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.log if event["kind"] == kind]


def write(out: Path, to: Path | None = None) -> None:
    """Write the report of a run beside its files, or elsewhere."""
    safeio.write(to or out / "report.html", page(out).encode("utf-8", "replace"))


def page(out: Path) -> str:
    """HTML. What is missing in the folder is missing in the page; what is damaged is said to be."""
    told = _told(out)
    one = told.record
    parts = [
        ("What it learnt", _learnt),
        ("What it adapts", _adapted),
        ("While it trained", _previews),
        ("Loss by step", _loss),
        ("Learning rate by step", _rate),
        ("Pictures", _pictures),
        ("Warnings", _warnings),
        ("Time", _time),
        ("Files", _files),
        ("Particulars", _particulars),
    ]
    body = "".join(_section(title, make, told) for title, make in parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(one.name)} · sdlora</title>'
        f"<style>{STYLE.read_text('utf-8')}</style></head><body>{_head(told)}<main>{body}</main>"
        "<footer>Written by sdlora from the files of the run; the page holds all that it shows.</footer></body></html>\n"
    )


def curves(out: Path) -> str:
    """The loss of a run as a figure (HTML with an SVG in it), or nothing before there is one."""
    return _loss(_told(out))


def _told(out: Path) -> Told:
    try:
        table = settings.read(out / "config.toml")
    except UserError:
        table = {}
    one, log = record.read_whole(out)
    return Told(out, one, log, table, _json(out / "ledger.json"), _json(out / "environment.json"))


def _section(title: str, make: Callable[[Told], str], told: Told) -> str:
    """A part of the page, if there is anything to say. Damaged files must not end the run that writes its report."""
    try:
        body = make(told)
    except (AttributeError, KeyError, TypeError, ValueError, OSError):
        body = '<p class="soft">A file that this part is made of is damaged.</p>'
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _head(told: Told) -> str:
    one, log = told.record, told.log
    state = str(record.ENDS.get(log[-1]["kind"], "unfinished") if log else "not begun")
    table = told.settings
    trigger = table.get("trigger")
    facts = [f"on {_plain(one.base)}" if one.base else "", f"called up by “{trigger}”" if trigger else "", _date(one.started)]
    pictures = told.ledger.get("totals", {})
    speed = _step_seconds(log)
    tiles = {
        "Steps": f"{one.step:,}<small> of {one.steps:,}</small>" if one.steps else f"{one.step:,}",
        "Loss, smoothed": f"{one.loss:.4f}" if one.loss is not None else "",
        "Time at work": _duration(one.seconds),
        "A step": _duration(speed) if speed else "",
        "Pictures": escape(str(pictures.get("used", ""))) if isinstance(pictures, dict) else "",
    }
    shown = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles.items() if value)
    kind = f"{one.kind} LoRA".strip().capitalize().replace("lora", "LoRA")
    return (
        f'<header><p class="kind">{escape(kind)} <span class="state {state.replace(" ", "-")}">{state}</span></p>'
        f"<h1>{escape(one.name)}</h1><p>{escape(' · '.join(fact for fact in facts if fact))}</p><dl>{shown}</dl></header>"
    )


def _learnt(told: Told) -> str:
    figures = [event["data"] for event in told.log if "distance_adapter" in event["data"]]
    said = ""
    if figures:
        base, adapter = figures[-1]["distance_base"], figures[-1]["distance_adapter"]
        said = (
            f"<p>Asked for {int(figures[-1]['pictures'])} of the captions, its pictures come out at <b>{adapter / base:.2f} times</b> the "
            f"base’s distance from the pictures that it was taught ({base:g} at scale 0, {adapter:g} at scale 1).</p>"
        )
    strip = _image(told.out, "strip.png", "The same seed on the base and at rising scales of what was learnt, a row for each prompt")
    return said + strip


def _adapted(told: Told) -> str:
    rows = {event["data"]["adapted"]["part"]: event["data"]["adapted"] for event in told.of_kind("note") if "adapted" in event["data"]}
    heads = ("part", "layers", "rank", "parameters", "of the part's own", "learning rate")
    cells = [
        (part, one["layers"], ", ".join(map(str, one["ranks"])), f"{one['parameters']:,}", f"{one['share']:.2%}", _rates(one["lr"]))
        for part, one in rows.items()
    ]
    return _table(cells, heads) if cells else ""


def _rates(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _previews(told: Told) -> str:
    """One preview a step, the latest of each; that of step 0 is the base."""
    latest = {event["step"]: event["data"].get("file") for event in told.of_kind("preview")}
    steps = sorted(step for step in latest if step)
    every = max(1, -(-len(steps) // MOST_PREVIEWS))
    kept = [*([0] if 0 in latest else []), *steps[::-every][::-1]]
    labels = [f"step {step:,}" if step else "the base, before the first step" for step in kept]
    shown = [_image(told.out, str(latest[step]), f"Preview at {label}", label) for step, label in zip(kept, labels, strict=True)]
    more = f"<p class=soft>{len(latest) - len(kept)} others lie in the run folder.</p>" if len(kept) < len(latest) else ""
    return "".join(shown) + more if any(shown) else ""


def _loss(told: Told) -> str:
    losses = record.curve(told.log)
    if not losses:
        return ""
    smoothed = dict(zip(losses, record.smooth([*losses.values()]), strict=True))
    checked = {event["step"]: event["data"].get("loss") for event in told.of_kind("validation")}
    held = {step: value for step, value in sorted(checked.items()) if record.number(value) and value is not None}
    series = [Series("each step", [*losses.items()], "dots"), Series("smoothed", [*smoothed.items()], "line")]
    series += [Series("validation", [*held.items()], "marks")] if held else []
    drawing = charts.chart("loss", f"Loss of {told.record.name} by step", "step", series)
    keys = "".join(f'<span class="key {one.look}">{KEYS[one.look]}</span>' for one in series)
    rows = [(f"{step:,}", _figure(losses[step]), _figure(smoothed[step]), _figure(held.get(step))) for step in _spread([*losses], [*held])]
    return f"<figure>{drawing}<figcaption>{keys}</figcaption></figure>" + _folded(
        "The figures", _table(rows, ("step", "loss", "smoothed", "validation")[: 4 if held else 3], "figures")
    )


def _rate(told: Told) -> str:
    rates = record.curve(told.log, "lr")
    if not rates:
        return ""
    drawing = charts.chart("rate", "Learning rate by step", "step", [Series("learning rate", [*rates.items()], "line")])
    rows = [(f"{step:,}", f"{rates[step]:.3g}") for step in _spread([*rates])]
    return f"<figure>{drawing}</figure>" + _folded("The figures", _table(rows, ("step", "learning rate"), "figures"))


def _pictures(told: Told) -> str:
    if not told.ledger:
        return ""
    totals, found = told.ledger["totals"], sorted(told.ledger["findings"], key=lambda one: one["severity"] != "warn")
    said = (
        f"{totals['found']} found, {totals['used']} used ({totals['of_these_fixed']} put right, {totals['of_these_warned']} with "
        f"warnings), {totals['left_out']} left out. {totals['samples_of_pictures']:,} samples of them, {totals['epochs']:g} epochs; at "
        f"{', '.join(f'{size} px ({count})' for size, count in [*totals['buckets_px'].items()][:6])}."
    )
    items = [
        f'<li class="{"warn" if one["severity"] == "warn" else "note"}"><b>{escape(one["code"])}</b> {escape(one["detail"])}'
        f"{escape(_names(one['files']))}<br><span class=soft>{escape(doctor.REASONS.get(one['code'], ''))}</span></li>"
        for one in found[:MOST_FINDINGS]
    ]
    more = [f"<li class=soft>and {len(found) - MOST_FINDINGS} more in ledger.json</li>"] if len(found) > MOST_FINDINGS else []
    out = [row for row in told.ledger["pictures"] if row["fate"] == "left_out"]
    rows = [(row["file"], row["detail"] or " ".join(reasons.REASONS.get(code, code) for code in row["why"])) for row in out]
    left = _folded(f"{len(out)} left out, and why", _table(rows[:100], ("picture", "why"))) if out else ""
    return f"<p>{escape(said)}</p>" + (f"<ul>{''.join(items + more)}</ul>" if items else "") + left


def _warnings(told: Told) -> str:
    """What was warned of beside the findings, which stand with the pictures."""
    codes = tuple(str(one["code"]) for one in told.ledger.get("findings", ()))
    said = dict.fromkeys(event["text"] for event in told.of_kind("warning") if not codes or not event["text"].startswith(codes))
    lines = [f'<li class="warn">{escape(text)}</li>' for text in said]
    if told.record.unread:
        lines.append(f'<li class="warn">{told.record.unread} lines of events.jsonl cannot be read and were passed over</li>')
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _time(told: Told) -> str:
    if not told.log:
        return ""
    spans = _phases(record.sittings(told.log)[-1])
    whole = sum(spans.values()) or 1.0
    bar = "".join(f'<i class="{PHASES[name]}" style="flex:{seconds / whole:.4f} 0 0"></i>' for name, seconds in spans.items())
    rows = "".join(
        f'<tr class="{PHASES[name]}"><td>{name}</td><td>{_duration(seconds)}</td><td>{seconds / whole:.0%}</td></tr>'
        for name, seconds in spans.items()
    )
    times = len(record.sittings(told.log))
    taken = f"<p>Taken up {times} times; this is the last.</p>" if times > 1 else ""
    return f'{taken}<div class="bar" aria-hidden="true">{bar}</div><table class="figures phases"><tbody>{rows}</tbody></table>'


def _phases(sitting: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of one sitting, in order: until the log begins, to the first step, the steps, and what came after."""
    first, last = sitting[0]["time"], sitting[-1]["time"]
    trained = [i for i, event in enumerate(sitting) if event["kind"] in ("step", "checkpoint", "validation", "preview")]
    begin = sitting[trained[0] - 1]["time"] if trained and trained[0] else last
    end = sitting[trained[-1]]["time"] if trained else last
    whole = sitting[-1]["data"].get("seconds", 0.0)
    loading = whole - (last - first) if record.number(whole) else 0.0
    spans = zip(PHASES, (loading, begin - first, end - begin, last - end), strict=True)
    return {name: seconds for name, seconds in spans if seconds > 0.05}


def _step_seconds(log: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a step: the median over the readings of the loss, of which each tells several steps at once."""
    steps = [event for event in log if event["kind"] == "step"]
    ends = [one for one, after in itertools.pairwise([*steps, None]) if one and (not after or after["time"] - one["time"] > 0.005)]
    gaps = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(ends) if b["step"] > a["step"]]
    return statistics.median(gaps) if gaps else 0.0


def _files(told: Told) -> str:
    rows: list[Row] = []
    if told.record.pack:
        rows.append((told.record.pack.name, "the pack", _bytes(told.record.pack)))
    kept = sorted(path for path in (told.out / "checkpoints").glob("ckpt-*") if path.is_dir())
    rows += [(f"checkpoints/{path.name}", "checkpoint", _bytes(path)) for path in kept]
    return _table(rows, ("file", "", "size"), "figures") if rows else ""


def _particulars(told: Told) -> str:
    """What only few readers open."""
    around = [(key, value if isinstance(value, str | int | float) else json.dumps(value)) for key, value in told.environment.items()]
    notes = told.of_kind("note")
    said = "".join(f"<li>{escape(event['text'])}</li>" for event in notes if event["text"] and "adapted" not in event["data"])
    return (
        (_folded("Settings", f"<pre>{escape(tomli_w.dumps(_shareable(told.settings)))}</pre>") if told.settings else "")
        + (_folded("Environment", _table(around, ("", ""))) if around else "")
        + (_folded("What was said", f"<ul>{said}</ul>") if said else "")
    )


def _shareable(table: dict[str, Any]) -> dict[str, Any]:
    """Settings without the places of this machine: of a path only its last part stays."""

    def kept(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [kept("", one) for one in value]
        if isinstance(value, dict):
            return {inner: kept(inner, one) for inner, one in value.items()}
        return _plain(value) if key in ("folder", "base") and isinstance(value, str) else value

    return {key: kept(key, value) for key, value in table.items()}


def _plain(place: str) -> str:
    return Path(place).name if Path(place).is_absolute() else place


def _image(out: Path, name: str, alt: str, caption: str = "") -> str:
    """A picture of the run inside the page; nothing, if it is none or lies elsewhere."""
    path = (out / name).resolve()
    if not path.is_file() or not path.is_relative_to(out.resolve()):
        return ""
    buffer = io.BytesIO()
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            small = picture.convert("RGB")
        small.thumbnail((WIDEST_PX, 8 * WIDEST_PX), Image.Resampling.LANCZOS)
        small.save(buffer, "WebP", quality=90)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    data = base64.b64encode(buffer.getvalue()).decode()
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f'width="{small.width}" height="{small.height}" src="data:image/webp;base64,{data}"'
    wide = "picture wide" if small.width > 2 * small.height or small.width >= 800 else "picture"
    return f'<figure class="{wide}">{said}<div tabindex="0"><img alt="{escape(alt)}" {source}></div></figure>'


def _table(rows: Iterable[Row], heads: Sequence[str], kind: str = "") -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row[: len(heads)])}</tr>" for row in rows)
    return f'<table class="{kind}">{f"<thead><tr>{top}</tr></thead>" if any(heads) else ""}<tbody>{body}</tbody></table>'


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _spread(steps: Sequence[int], also: Sequence[int] = ()) -> list[int]:
    """About twenty of the steps, the last among them, and those with a figure of their own."""
    every = max(1, -(-len(steps) // MOST_ROWS))
    return sorted({*steps[every - 1 :: every], *steps[-1:], *set(also).intersection(steps)})


def _names(files: Sequence[str]) -> str:
    return f" ({', '.join(files[:3])}{f' and {len(files) - 3} more' if len(files) > 3 else ''})" if files else ""


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    """In the two largest units."""
    if seconds < 10:
        return f"{seconds:.{2 if seconds < 1 else 1}f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _date(seconds: float | None) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC" if seconds else ""
    except (OverflowError, ValueError, OSError):  # a clock gone wrong
        return ""


def _bytes(path: Path) -> str:
    size = sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file())
    return f"{size / 1e6:,.1f} MB"


def _json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
