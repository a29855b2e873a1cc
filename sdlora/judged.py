"""What `find best` found, as a page: checkpoints by scales in pictures, the training picture nearest to each, and what to use."""

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sdlora import pictures, safeio
from sdlora.judge import Judge, Sample

FOLDER = "pictures"
HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing but what it holds."""
INSIDE = re.compile(rf"{FOLDER}/[\w.+-]+\.jpg|\w+\.png")
"""Files of the folder that a page shows, whatever its score.json says."""
FIGURES = ("likeness", "drift", "score", "memorisation", "following", "diversity")
PLOTS = {"front.png": "Likeness against drift", "following.png": "Likeness against prompts followed"}

Place = Callable[[str], str]  # a file of the folder -> where a page finds it
Choice = Callable[[int, float], str]  # (step, scale) -> what lets a user take it, as HTML


def keep(out: Path, judge: Judge) -> list[dict[str, Any]]:
    """Write the pictures of a judging, and of the training pictures those that are nearest to one; gives what each is of."""
    made: dict[str, bytes] = {}
    rows = []
    steps = {row.name: row.step for row in judge.rows}
    for (name, scale), samples in judge.samples.items():
        for i, sample in enumerate(samples):
            files = {"file": f"{FOLDER}/{steps[name]}-{scale:g}-{i}.jpg", "nearest": f"{FOLDER}/seen-{sample.nearest}.jpg"}
            made[files["file"]] = pictures.small(sample.picture)
            made.setdefault(files["nearest"], pictures.small(pictures.images(judge.truth.seen[sample.nearest :][:1])[0]))
            rows.append(
                {"name": name, "step": steps[name], "scale": scale, "prompt": sample.prompt, "number": i, **_figure(sample), **files}
            )
    for name, content in made.items():
        safeio.write(out / name, content, durable=False)  # they can be drawn again
    for path in (out / FOLDER).iterdir():
        if f"{FOLDER}/{path.name}" not in made:  # of a judging before
            safeio.remove(path)
    return rows


def read(out: Path) -> dict[str, Any]:
    """What was found, or nothing where nothing was, or what was is damaged."""
    try:
        table = json.loads((out / "score.json").read_bytes())
        body(table, str)  # what cannot be shown is damaged
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}
    return dict(table)


def style() -> str:
    """What `body` needs of a page's style."""
    return (HERE / "judged.css").read_text("utf-8")


def page(out: Path) -> str:
    """A page that holds all that it shows."""

    def inside(name: str) -> str:
        kind = "png" if name.endswith(".png") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode((out / name).read_bytes()).decode()}"

    table = read(out)
    title = escape(str(table.get("title", "")))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title} · sdlora</title>'
        f"<style>{(HERE / 'report.css').read_text('utf-8')}{style()}</style></head><body><header><h1>{title}</h1></header>"
        f"<main>{body(table, inside)}</main></body></html>\n"
    )


def body(table: Mapping[str, Any], place: Place, choice: Choice | None = None) -> str:
    """The inner part of a page, from score.json: recommendation, pictures, figures, plots."""
    lead = f"Seen by {table['eyes']}; likeness to {table['likeness_to']}."
    said = f'<p class="verdict"><b>{escape(_sentence(table["words"]))}</b></p><p class="soft">{escape(lead)}</p>'
    plots = "".join(f'<figure class="plot"><img alt="{label}" src="{escape(place(name))}"></figure>' for name, label in PLOTS.items())
    shown = [one for one in table["pictures"] if INSIDE.fullmatch(one["file"]) and INSIDE.fullmatch(one["nearest"])]
    prompts = {int(one["number"]): str(one["prompt"]) for one in shown}
    grids = "".join(
        f"<details{'' if i else ' open'}><summary>{escape(prompt)}</summary>"
        f"{_grid([one for one in shown if one['number'] == i], table['recommended'], place)}</details>"
        for i, prompt in prompts.items()
    )
    note = (
        "Below each picture: the training picture that is nearest to it, and how near it is, as a share of that one's distance to its own "
        "nearest; near 0: a copy."
    )
    return f'{said}<section><h2>Pictures</h2><p class="soft">{note}</p>{grids}</section>{_figures(table, choice)}<section>{plots}</section>'


def _grid(shown: Sequence[Mapping[str, Any]], best: Mapping[str, Any], place: Place) -> str:
    """Rows: checkpoints; columns: scales, the base's first."""
    scales = sorted({float(one["scale"]) for one in shown if one["name"] != "base"})
    cells = {(one["name"], float(one["scale"])): one for one in shown}
    names = list(dict.fromkeys(one["name"] for one in shown if one["name"] != "base"))
    rows = ""
    for i, name in enumerate(names):
        own = [(name, scale) for scale in scales]
        first = _cell(cells.get(("base", 0.0)), False, place, f" rowspan={len(names)}") if i == 0 else ""
        found = "".join(_cell(cells.get(key), key == (best["name"], float(best["scale"])), place) for key in own)
        rows += f'<tr>{first}<th scope="row">{escape(name)}</th>{found}</tr>'
    head = "".join(f'<th scope="col">scale {scale:g}</th>' for scale in scales)
    return f'<div class="choices"><table><tr><th scope="col">the base</th><td></td>{head}</tr>{rows}</table></div>'


def _cell(one: Mapping[str, Any] | None, is_best: bool, place: Place, more: str = "") -> str:
    if one is None:
        return f"<td{more}></td>"
    near = "" if one["memorisation"] is None else f"{float(one['memorisation']):.2f}"
    alt = escape(f"{one['prompt']}, {one['name']} at scale {one['scale']:g}")
    mark = ' class="best"' if is_best else ""
    return (
        f'<td{mark}{more}><img alt="{alt}" src="{escape(place(one["file"]))}">'
        f'<span class="near"><img alt="the nearest training picture" src="{escape(place(one["nearest"]))}">{near}</span></td>'
    )


def _figures(table: Mapping[str, Any], choice: Choice | None) -> str:
    rows = ""
    for row in table["rows"]:
        figures = "".join(f"<td>{'' if row[name] is None else f'{float(row[name]):.3f}'}</td>" for name in FIGURES)
        able = row["name"] != "base"
        taken = "" if choice is None else f"<td>{choice(int(row['step']), float(row['scale'])) if able else ''}</td>"
        rows += f'<tr><th scope="row">{escape(str(row["name"]))}</th><td>{float(row["scale"]):g}</td>{figures}{taken}</tr>'
    head = "".join(f"<th>{name}</th>" for name in ("", "scale", *FIGURES, *([] if choice is None else [""])))
    return f'<section><h2>Figures</h2><div class="scroll"><table class="figures plain"><tr>{head}</tr>{rows}</table></div></section>'


def _figure(sample: Sample) -> dict[str, float | None]:
    """Not a number, as of a single training picture, is none."""
    return {"memorisation": round(sample.memorisation, 4) if sample.memorisation == sample.memorisation else None}


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."
