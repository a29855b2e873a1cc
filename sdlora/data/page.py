"""The ledger as one web page: each picture with its crop drawn on it, what becomes of it and why. It needs no other file."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image, ImageDraw

from sdlora.data import doctor, reasons
from sdlora.data.pixels import read_picture
from sdlora.data.scan import Item

THUMBNAIL_PX = 176
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color-scheme: light dark }
ul { padding-left: 1.2rem } .cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)) }
.card { border: 1px solid #8886; border-left: .35rem solid #3a9d5d; border-radius: .4rem; overflow-wrap: anywhere; padding: .7rem }
.card.fixed { border-left-color: #3b7dd8 } .card.warned { border-left-color: #d99a1b } .card.left_out { border-left-color: #cc3b3b }
.card img { display: block; max-width: 100% } .card p { margin: .35rem 0 0 } .card small { opacity: .75 }
"""


def page(title: str, ledger: Mapping[str, Any], items: Iterable[tuple[str, Item]], ground: str) -> str:
    """HTML; `items` are the used pictures under the names that the ledger gives them."""
    by_name = dict(items)
    totals = ledger["totals"]
    summary = (
        f"{totals['found']} found, {totals['used']} used ({totals['of_these_fixed']} of them put right, {totals['of_these_warned']} with "
        f"warnings), {totals['left_out']} left out"
    )
    found = [
        f"{one['code']}: {one['detail']} ({', '.join(one['files'][:6]) or 'all'}). {doctor.REASONS[one['code']]}"
        for one in ledger["findings"]
    ]
    cards = "".join(_card(row, by_name.get(row["file"]), ground) for row in ledger["pictures"])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{escape(title)}</h1><p>{escape(summary)}; {totals['steps']} steps show {totals['samples_of_pictures']} "
        f"samples, {totals['epochs']} epochs</p><ul>{_list(found)}</ul><div class=cards>{cards}</div></html>"
    )


def _list(lines: Sequence[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _card(row: Mapping[str, Any], item: Item | None, ground: str) -> str:
    why = [f"{code}: {({**doctor.REASONS, **reasons.REASONS}).get(code, '')}" for code in row["why"]]
    shown = ""
    if item:
        size, bucket = "x".join(map(str, row["size_px"])), " and ".join(row["shown_at"])
        crops = [one["crop_px"] for one in row["shown_as"]]
        ways = f" in {len(row['shown_as'])} ways" if len(row["shown_as"]) > 1 else ""
        said = escape(" / ".join(row["captions"])) or "<i>no caption</i>"
        shown = (
            f"<img alt='' src='data:image/jpeg;base64,{_thumbnail(item, crops, ground)}'><p>{said}</p>"
            f"<p><small>{size} px, trained at {bucket}, shown {row['shown']} times{ways}</small></p>"
        )
    return f"<div class='card {row['fate']}'><b>{escape(row['file'])}</b> {row['fate'].replace('_', ' ')}{shown}<ul>{_list(why)}</ul></div>"


def _thumbnail(item: Item, crops: Sequence[Sequence[float]], ground: str) -> str:
    """The picture, dimmed where its first crop cuts it off, with the others' edges: JPEG in base64."""
    picture = read_picture(item.path, ground)
    factor = THUMBNAIL_PX / max(picture.size)
    small = picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.LANCZOS)
    kept = Image.new("L", small.size, 90)
    boxes = [[round(edge * factor) for edge in crop] for crop in crops]
    inside = [(box[0], box[1], box[2] - 1, box[3] - 1) for box in boxes]
    ImageDraw.Draw(kept).rectangle(inside[0], fill=255)
    for further in inside[1:]:
        ImageDraw.Draw(kept).rectangle(further, outline=160)
    buffer = io.BytesIO()
    Image.composite(small, Image.new("RGB", small.size, "#777"), kept).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
