"""Whether the judge tells right from wrong: adapters planted as untrained, good, over-trained, of another subject, and at wrong scales.

    python bench/planted.py GOOD OVER WRONG [--seeds 10] [--held-share 0.2]

GOOD, OVER and WRONG are run folders of the same settings (but the steps, and WRONG's pictures). For each seed all of them are judged by
new noise; printed is how often the good one comes first and how far its recommended scale is from the best in hindsight, over all seeds.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from sdlora import api, best, eyes, judge, settings
from sdlora.data import ledger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("good", type=Path)
    parser.add_argument("over", type=Path)
    parser.add_argument("wrong", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--scales", default="0.25,0.5,0.75,1,1.25,1.5,2")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    scales = [float(scale) for scale in options.scales.split(",")]
    settled = api.settle(settings.read(options.good / "config.toml"))
    studio = api.open_studio()
    dataset = ledger.fit_dataset(ledger.read_dataset(settled, options.good / "cache"), settled, studio.family)
    questions, truth = best.material(settled, dataset, best.Asking(scales=tuple(scales), prompts=options.prompts, steps=options.steps))
    sight = eyes.opened("base", studio.family)
    packs = {
        name: studio.add(api.open_pack(next(folder.glob("*.safetensors"))))
        for name, folder in vars(options).items()
        if isinstance(folder, Path)
    }
    first, found = Counter[str](), []
    for seed in range(options.seeds):
        asked = judge.Questions(questions.asked, questions.other, [1000 + seed], scales, questions.size, questions.steps)
        one = judge.Judge(studio, asked, truth, sight)
        for name in packs.values():
            one.ask(name, 0)
        verdict = one.verdict()
        names = {name: label for label, name in packs.items()} | {"base": "untrained"}
        tops = {
            label: max((row for row in verdict.rows if names[row.name] == label), key=lambda row: row.score) for label in names.values()
        }
        order = sorted(tops, key=lambda label: -tops[label].score)
        first[order[0]] += 1
        found.append({names[row.name]: [] for row in verdict.rows})
        for row in verdict.rows:
            found[-1][names[row.name]].append(
                (row.scale, round(row.score, 3), round(row.likeness, 3), round(row.drift, 3), round(row.memorisation, 2))
            )
        print(seed, order, tops["good"].scale, {label: round(top.score, 3) for label, top in tops.items()}, flush=True)
        if seed == 0:
            print(json.dumps(found[0]))
    mean = {scale: sum({s: v for s, v, *_ in one["good"]}[scale] for one in found) / len(found) for scale in scales}
    hindsight = max(mean, key=lambda scale: mean[scale])
    near = sum(abs(max(one["good"], key=lambda row: row[1])[0] - hindsight) <= 0.25 for one in found)
    print(f"first: {dict(first)} of {options.seeds}; hindsight scale {hindsight:g}; recommended within 0.25 of it in {near}")


if __name__ == "__main__":
    main()
