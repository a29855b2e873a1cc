"""What is said about a picture in training: its own caption, with the trigger in it."""

import re


def resolve(caption: str | None, kind: str, trigger: str) -> str:
    """The final caption: a character's name comes first, a style is named at the end; `[trigger]` marks another place."""
    said = caption or ""
    if "[trigger]" in said:
        return said.replace("[trigger]", trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", said, re.IGNORECASE):
        return said
    parts = [trigger, said] if kind == "character" else [said, f"{trigger} style"]
    return ", ".join(part for part in parts if part)
