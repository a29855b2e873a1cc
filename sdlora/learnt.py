"""Did it learn? A pack is asked for a few pictures at scale 1, and they are compared with those of its run and with the base's."""

from dataclasses import dataclass
from pathlib import Path

from sdlora import best, settings
from sdlora.errors import UserError
from sdlora.judge import Asking, Judge, Judged
from sdlora.settling import settle
from sdlora.studio import Studio

ASKING = Asking(scales=(1.0,), prompts=4, seeds=1)
NOTHING = 0.01
"""Drift on prompts that name the trigger below which nobody sees what the pack does."""


@dataclass(frozen=True)
class Learnt:
    """The base and the pack in figures, and what they say."""

    base: Judged
    pack: Judged
    much: bool  # whether the pack's likeness less its drift is measurably above the base's
    words: str


def learnt(run: Path, studio: Studio, name: str) -> Learnt:
    """A pack that sits on a studio, by the pictures of the run in whose folder it lies. Raises `UserError` where it has no effect."""
    config = run / "config.toml"
    if not config.is_file():
        what = "no run lies beside this pack, so nobody knows its pictures"
        raise UserError("E-BEST-02", what, run, "judge it by a folder with `sdlora find best PACK --data FOLDER`")
    judge = Judge(studio, *best.asked(settle(settings.read(config), config), studio, ASKING, run))
    judge.ask(name, 0)
    base, pack = judge.rows
    if pack.effect < NOTHING:
        todo = "train longer, at a higher rate, or with more layers as adapter.targets"
        raise UserError("E-BEST-03", f"this pack has no effect: at scale 1 pictures change by {pack.effect:.3f} (of 1)", name, todo)
    verdict = judge.verdict()
    much = verdict.best is pack and base not in verdict.equal
    said = "it learnt" if much else "it changes pictures, but not measurably towards yours"
    figures = f"likeness to your pictures {pack.likeness:.2f} (the base {base.likeness:.2f}), drift on other prompts {pack.drift:.2f}"
    return Learnt(base, pack, much, f"{said}: {figures}; {ASKING.prompts} pictures of each, seen by {verdict.eyes}")
