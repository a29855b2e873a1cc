"""What is said about a picture in one sample of training: a pure function of its captions, the settings and the sample's number.

One of its captions is chosen, `{red|blue}` in it becomes one of the two, its tags are mixed, and the trigger comes in.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from numpy.random import Generator

from sdlora import family
from sdlora.config import Data, Run, names_trigger
from sdlora.data.scan import Item
from sdlora.randomness import stream

T = TypeVar("T")
DEEPEST = 16  # groups within groups; what is deeper is text
PLACEHOLDER = "[trigger]"


def final(item: Item, run: Run, number: int) -> str:
    """The caption of a picture in the sample of this number."""
    caption = choose(item.captions or ("",), run.seed, number)
    if "{" in caption:
        options = stream(run.seed, "wildcards", number)
        caption = expand(caption, lambda group: group[int(options.integers(len(group)))])
    if mixes_tags(run.data):
        caption = mix_tags(caption, run.data, run.trigger, stream(run.seed, "tags", number))
    return caption if item.regularisation else resolve(caption, run.kind, run.trigger)


def templates(item: Item, run: Run) -> list[str]:
    """All captions of a picture with the trigger in them, in order; groups and tags as they are written."""
    captions = item.captions or ("",)
    return [caption if item.regularisation else resolve(caption, run.kind, run.trigger) for caption in captions]


def vary(items: Sequence[Item], data: Data) -> bool:
    """Whether what is said changes from sample to sample by more than the choice among whole captions."""
    return any((mixes_tags(data) and "," in caption) or longest(caption) != caption for item in items for caption in item.captions)


def mixes_tags(data: Data) -> bool:
    return data.shuffle_tags or data.tag_dropout > 0


def choose(options: Sequence[T], seed: int, number: int) -> T:
    """The one of several captions that a sample says."""
    return options[int(stream(seed, "caption", number).integers(len(options)))] if len(options) > 1 else options[0]


def expand(caption: str, pick: Callable[[list[str]], str]) -> str:
    """The caption with one option of each `{a|b|c}`; options may be empty or hold groups, and braces without a bar or a pair are text."""
    groups: list[list[list[str]]] = [[[]]]  # open groups of options of pieces; the outermost is the caption itself
    for piece in re.split(r"([{|}])", caption):
        if piece == "{" and len(groups) <= DEEPEST:
            groups.append([[]])
        elif piece == "|" and len(groups) > 1:
            groups[-1].append([])
        elif piece == "}" and len(groups) > 1:
            options = ["".join(option) for option in groups.pop()]
            groups[-1][-1].append(pick(options) if len(options) > 1 else f"{{{options[0]}}}")
        else:
            groups[-1][-1].append(piece)
    while len(groups) > 1:
        unclosed = "|".join("".join(option) for option in groups.pop())
        groups[-1][-1].append("{" + unclosed)
    return " ".join("".join(groups[0][0]).split())


def longest(caption: str) -> str:
    """The caption with the longest option of each group: what has to fit into the text encoder."""
    return expand(caption, lambda group: max(group, key=len))


def token_counter(run: Run) -> Callable[[str], int]:
    """What counts the tokens that a run's base makes of a caption with the trigger in it; the base's weights are not read."""
    tokenizer = family.find(run.base).source.tokenizer("tokenizer")

    def count(caption: str) -> int:
        return len(tokenizer(longest(resolve(caption, run.kind, run.trigger)), add_special_tokens=False, verbose=False).input_ids)

    return count


def mix_tags(caption: str, data: Data, trigger: str, random: Generator) -> str:
    """A list of tags with those after the first `keep_tokens` in random order, each left out as often as is set; never the trigger."""
    tags = tags_of(caption)
    kept, rest = tags[: data.keep_tokens], tags[data.keep_tokens :]
    chances = random.random(len(rest))
    rest = [tag for tag, chance in zip(rest, chances, strict=True) if chance >= data.tag_dropout or names(tag, trigger)]
    if data.shuffle_tags:
        rest = [rest[i] for i in random.permutation(len(rest))]
    return ", ".join([*kept, *rest])


def tags_of(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


def names(caption: str, trigger: str) -> bool:
    """Whether the trigger, or the place for it, stands in a caption as a word of its own."""
    return PLACEHOLDER in caption or names_trigger(caption, trigger)


def resolve(caption: str, kind: str, trigger: str) -> str:
    """The final caption: a character's name comes first, a style is named at the end; `[trigger]` marks another place."""
    if names(caption, trigger):
        return caption.replace(PLACEHOLDER, trigger)
    parts = [trigger, caption] if kind == "character" else [caption, f"{trigger} style"]
    return ", ".join(part for part in parts if part)
