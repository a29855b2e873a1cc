"""Writes docs/settings.md and docs/settings.schema.json from the settings' own fields, so that nothing is declared twice.

python tools/make_docs.py [--check]      --check: only say whether they are up to date
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from sdlora import defaults, lookup
from sdlora.config import CHOICES, Run, run_class
from sdlora.settings import Settings

DOCS = Path(__file__).parent.parent / "docs"
HEAD = """# Settings

Every setting that a TOML file (`sdlora train --config F.toml`) or `--set a.b=c` can give, generated from the code by `make docs`.
A setting without a default here depends on the kind of the run and on its base: the last table has those values, and
`sdlora config F.toml` prints a run's settings complete. Anything else is an error that names the nearest right setting.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wanted = documents()
    old = stale(wanted)
    if check:
        sys.exit(f"out of date, run `make docs`: {', '.join(old)}" if old else 0)
    for name in old:
        (DOCS / name).write_text(wanted[name], "utf-8")


def stale(wanted: dict[str, str]) -> list[str]:
    """Names of the documents that are missing or say something else."""
    return [name for name, text in wanted.items() if not (DOCS / name).is_file() or (DOCS / name).read_text("utf-8") != text]


def documents() -> dict[str, str]:
    """File name -> content."""
    run = run_class({table: kind for table, (_, kind) in CHOICES.items()})
    schema = json.dumps(run.model_json_schema(), indent=1) + "\n"
    return {"settings.md": "\n".join([HEAD, *tables(), *by_job()]) + "\n", "settings.schema.json": schema}


def tables() -> Iterator[str]:
    plain = {name: info for name, info in Run.model_fields.items() if not _is_table(info)}
    yield from table("The run itself", "", plain)
    for name, info in Run.model_fields.items():
        if name in CHOICES:
            for kind in lookup.names(CHOICES[name][0]):
                config = lookup.find(CHOICES[name][0], kind).Config
                yield from table(f'[{name}] kind = "{kind}"', f"{name}.", config.model_fields)
        elif _is_table(info):
            assert isinstance(info.annotation, type)
            assert issubclass(info.annotation, Settings)
            yield from table(f"[{name}]", f"{name}.", info.annotation.model_fields)
            for inner, listed in info.annotation.model_fields.items():
                for cls in get_args(listed.annotation):
                    if isinstance(cls, type) and issubclass(cls, Settings):
                        yield from table(f"[[{name}.{inner}]]", f"{name}.{inner}.", cls.model_fields)


def table(title: str, prefix: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    yield f"\n## {title}\n\n| setting | default | meaning |\n|---|---|---|"
    for name, info in fields.items():
        yield f"| `{prefix}{name}` | {shown(None if info.is_required() else info.default)} | {' '.join((info.description or '').split())} |"


def by_job() -> Iterator[str]:
    rows = sorted({row for _, row in defaults.TABLE})
    columns = [(kind, row) for row in rows for kind in ("character", "style")]
    yield "\n## Defaults that depend on the job\n"
    yield "| setting | " + " | ".join(f"{kind} on {row}" for kind, row in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    values = [defaults.settings(kind, row) for kind, row in columns]
    for name in dict.fromkeys(name for column in values for name in column):
        yield f"| `{name}` | " + " | ".join(shown(column.get(name)) for column in values) + " |"


def shown(value: Any) -> str:
    if value is None or value == "":
        return ""
    return f"`{json.dumps(value)}`"


def _is_table(info: FieldInfo) -> bool:
    return isinstance(info.default, Settings)


if __name__ == "__main__":
    main()
