"""Whether the judge tells right from wrong: adapters planted as untrained, good, over-trained, of another subject, and too strong.

    python bench/planted.py --photos FOLDER --other FOLDER --style FOLDER [--sets character,photos,style] [--out runs/planted]

What is planted is settled before any picture is judged, by what the judge does not see: all runs are plain (one constant rate, nothing
that holds the adapter to the base), the *good* one is the checkpoint with the lowest loss on pictures held out among those of the first
tenth of a run, or of all of the run that `--good` names; the *over-trained* one has exactly ten times the steps of the former, the *wrong*
one is the good one of another set under the same trigger, and *too strong* is the good one at twice its strength. Trained is what is not
there yet.

Each of `--seeds` judgings draws with noise of its own, as `sdlora find best` does; those that OUT/SET.json holds are not made again.

The protocol, settled before anything was judged by it. The first reading is *all at scale 1*, as a user gets a pack of which nothing is
recommended yet: only there does a wrong strength differ from the right one. The second is each *at the scale that suits it best*, of
`OTHERS` for the others than the good one, and without too strong, which is the good one by construction. A third, which favours the good
one, has it at the scale that all other judgings recommend, and the others at 1. Then how far the scale that a
judging recommends for the good one is from the best in hindsight, and what the checkpoint that it chooses loses on the best in hindsight,
by the mean score of all other judgings.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from sdlora import api, best, eyes, judge, learners, record, settings
from sdlora.data import ledger
from sdlora.packs.file import Pack

ROOT = Path(__file__).resolve().parent.parent
NAME = "tavi"
"""The trigger of all sets: that of the bundled character's captions."""
EVERY = 20
"""Steps between checkpoints."""
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 2.0)
OTHERS = (0.5, 1.0)
"""Scales of the good one, and of those beside it."""
SIGHT = "latents and local contrast"
"""Judgings that other features made are not mixed with these."""
WITHIN = 0.25
"""How far a recommended scale may be from the best."""

Scores = dict[str, dict[float, dict[str, Any]]]
"""Of one judging: candidate -> scale -> row."""


@dataclass(frozen=True)
class Planted:
    """A set and the run on it."""

    folder: Path
    kind: str
    budget: int  # steps within which the good one is looked for
    batch: int
    share: float  # of the pictures, held out
    wrong: str  # the set whose good adapter is this one's wrong subject
    over: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="photographs of one subject")
    parser.add_argument("--other", type=Path, required=True, help="photographs of another one")
    parser.add_argument("--style", type=Path, required=True, help="captioned pictures in one style")
    parser.add_argument("--sets", default="character,photos,style", help="which are judged")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draws", type=int, default=2, help="seeds of each judging, as of `find best`")
    parser.add_argument("--prompts", type=int, default=6, help="that name the trigger, and as many that do not")
    parser.add_argument("--steps", type=int, default=8, help="of drawing a picture")
    parser.add_argument("--good", action="append", default=[], help="SET=RUN: a finished run, of which the best checkpoint is the good one")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "planted")
    options = parser.parse_args()
    sets = {
        "character": Planted(ROOT / "datasets" / "tavi", "character", 100, 4, 0.2, "other"),
        "photos": Planted(options.photos, "character", 60, 4, 0.4, "other"),
        "other": Planted(options.other, "character", 100, 4, 0.4, "", over=False),
        "style": Planted(options.style, "style", 60, 8, 0.2, "character"),
    }
    asking = judge.Asking(scales=SCALES, prompts=options.prompts, seeds=options.draws, steps=options.steps)
    better = {name: Path(run) for name, run in (one.split("=", 1) for one in options.good)}
    for name in options.sets.split(","):
        wrong = sets[name].wrong
        trained(sets[wrong], options.out / wrong)
        steps = trained(sets[name], options.out / name)
        packs = {**candidates(options.out / name, steps, sets[name].budget), "wrong": good(options.out / wrong, sets[wrong].budget)}
        if name in better:
            packs["good"] = good(better[name], sys.maxsize)
        asked = {"good": steps[0], "over": steps[1], "draws": options.draws, "steps": options.steps, "prompts": options.prompts,
                 "eyes": SIGHT, "run": str(better.get(name, ""))}  # fmt: skip
        rounds = known(options.out / f"{name}.json", asked)
        for one in judged(options.out / name, packs, asking, range(len(rounds), options.seeds)):
            rounds.append(one)
            text = json.dumps({**asked, "rounds": rounds}, indent=1)
            api.save_text(options.out / f"{name}.json", lambda text=text: text)  # type: ignore[misc]
        print(json.dumps({"set": name, **asked, **figures(rounds)}, indent=1), flush=True)


def known(file: Path, asked: Mapping[str, Any]) -> list[Scores]:
    """The judgings of the same that were made before."""
    table = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    rounds = table.get("rounds", []) if asked.items() <= table.items() else []
    return [{label: {float(scale): row for scale, row in rows.items()} for label, rows in one.items()} for one in rounds]


def trained(one: Planted, out: Path) -> tuple[int, int]:
    """Train what is not trained yet; the steps of the good one and of the over-trained."""
    table = {
        "name": NAME, "kind": one.kind, "data": {"folder": str(one.folder), "prior_share": 0.0},
        "train": {"steps": one.budget * (10 if one.over else 1), "batch_size": one.batch, "schedule": "constant",
                  "save_every": EVERY, "keep_checkpoints": 1000},
        "validation": {"share": one.share}, "preview": {"scales": [], "every": 0},
    }  # fmt: skip
    run = api.settle(table)
    known = record.read(out) if out.is_dir() else None
    if not known or known.state != "finished" or known.step < learners.given(run.train.steps):
        for event in api.train(run, out):
            if event.kind not in ("step", "checkpoint"):
                print(f"{out.name}: {event.text}", flush=True)
    step = lowest(out, one.budget)
    return step, 10 * step


def lowest(run: Path, budget: int) -> int:
    """The step, up to a budget, with the lowest loss on pictures held out."""
    events = [event for event in record.events(run)[0] if event["kind"] == "validation" and 0 < event["step"] <= budget]
    return int(min(events, key=lambda event: event["data"]["loss"])["step"])


def checkpoints(run: Path) -> dict[int, Pack]:
    settled = api.settle(settings.read(run / "config.toml"))
    return best.checkpoints(settled, learners.base_of(settled), run, most=1000)


def good(run: Path, budget: int) -> Pack:
    return checkpoints(run)[lowest(run, budget)]


def candidates(run: Path, steps: tuple[int, int], budget: int) -> dict[str, Pack]:
    """The good one, the over-trained one, and by their steps those between which a checkpoint is to be chosen."""
    found = checkpoints(run)
    ladder = {EVERY * max(1, round(budget * share / EVERY)) for share in (0.5, 2, 5)}
    return {"good": found[steps[0]], "over": found[steps[1]], **{str(step): found[step] for step in sorted(ladder - {*steps})}}


def judged(run: Path, packs: Mapping[str, Pack], asking: judge.Asking, seeds: Iterable[int]) -> Iterator[Scores]:
    """What each judging said of each candidate."""
    settled = api.settle(settings.read(run / "config.toml"))
    studio = api.open_studio()
    dataset = ledger.fit_dataset(ledger.read_dataset(settled, run / "cache"), settled, studio.family)
    questions, truth = judge.material(settled, dataset, asking)
    sight = eyes.opened("base", studio.family)
    names = {label: studio.add(replace(pack, name=label)) for label, pack in packs.items()}
    for seed in seeds:
        noise = [1000 * (seed + 1) + i for i in range(asking.seeds)]
        one = judge.Judge(studio, replace(questions, seeds=noise), truth, sight)
        for label, name in names.items():
            one.ask(name, 0, SCALES if label == "good" else OTHERS if label in ("over", "wrong") else (1.0,))
        labels = {name: label for label, name in names.items()} | {"base": "untrained"}
        found: Scores = {}
        for row in one.rows:
            found.setdefault(labels[row.name], {})[row.scale] = row.table()
        tops = {label: max(row["score"] for row in rows.values()) for label, rows in found.items()}
        print(run.name, seed, {label: round(top, 3) for label, top in sorted(tops.items(), key=lambda item: -item[1])}, flush=True)
        yield found


def figures(rounds: Sequence[Scores]) -> dict[str, Any]:
    """How often the judge was right."""
    plants = ("good", "over", "wrong")
    comes = [{**{label: one[label][1.0]["score"] for label in plants}, "untrained": one["untrained"][0.0]["score"],
              "too strong": one["good"][2.0]["score"]} for one in rounds]  # fmt: skip
    suited = [{label: max(row["score"] for row in one[label].values()) for label in plants} for one in rounds]
    chosen = [top(scores(one["good"])) for one in rounds]
    hindsight = [top(without(rounds, i, lambda one: scores(one["good"]))) for i in range(len(rounds))]
    right = [{**one, "good": rounds[i]["good"][hindsight[i]]["score"]} for i, one in enumerate(comes)]
    return {
        "judgings": len(rounds),
        "first at its right scale": sum(max(one, key=lambda label: one[label]) == "good" for one in right),
        "mean then": {label: round(mean(one[label] for one in right), 3) for label in right[0]},
        "first as it comes": sum(max(one, key=lambda label: one[label]) == "good" for one in comes),
        "first at its best scale": sum(max(one, key=lambda label: one[label]) == "good" for one in suited),
        "mean as it comes": {label: round(mean(one[label] for one in comes), 3) for label in comes[0]},
        "memorisation at 1": {label: round(mean(one[label][1.0]["memorisation"] for one in rounds), 2) for label in plants},
        "scales chosen": chosen,
        "scale in hindsight": hindsight,
        f"within {WITHIN:g}": sum(abs(a - b) <= WITHIN for a, b in zip(chosen, hindsight, strict=True)),
        "good by scale": {scale: round(value, 3) for scale, value in without(rounds, -1, lambda one: scores(one["good"])).items()},
        **chosen_checkpoints(rounds),
    }


def chosen_checkpoints(rounds: Sequence[Scores]) -> dict[str, Any]:
    """Which checkpoint each judging chooses at scale 1, and what it loses on the best in hindsight, as a share of that one's score."""

    def at_one(one: Scores) -> dict[str, float]:
        return {label: rows[1.0]["score"] for label, rows in one.items() if label not in ("untrained", "wrong")}

    chosen = [top(at_one(one)) for one in rounds]
    lost = []
    for i, label in enumerate(chosen):
        after = without(rounds, i, at_one)
        lost.append(1 - after[label] / max(after.values()))
    means = without(rounds, -1, at_one)
    return {
        "checkpoints at 1": {label: round(value, 3) for label, value in means.items()},
        "checkpoints chosen": chosen,
        "lost on hindsight": [round(one, 3) for one in lost],
        "lost at most 5 %": sum(one <= 0.05 for one in lost),
    }


def scores(rows: Mapping[float, Mapping[str, Any]]) -> dict[float, float]:
    return {scale: row["score"] for scale, row in rows.items()}


def without(rounds: Sequence[Scores], place: int, read: Any) -> dict[Any, float]:
    """The mean of a judging's scores over all but that at a place; -1: over all."""
    read_all = [read(one) for i, one in enumerate(rounds) if i != place or len(rounds) == 1]
    return {key: mean(one[key] for one in read_all) for key in read_all[0]}


def top(found: Mapping[Any, float]) -> Any:
    return max(found, key=lambda key: found[key])


if __name__ == "__main__":
    main()
