"""Strict settings: what a table of a TOML file may hold, and errors that name the right setting."""

import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from sdlora.errors import UserError, escape_surrogates
from sdlora.lookup import nearest


class Settings(BaseModel):
    """Base of every table of settings: an unknown key or a wrong type is an error, and nothing changes after the build."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


AnySettings = TypeVar("AnySettings", bound=Settings)


def build(cls: type[AnySettings], table: dict[str, Any], source: object = "") -> AnySettings:
    """`cls` from a table. Raises one `UserError` that lists everything that is wrong with it."""
    broken = [name for name, text in _texts(table) if escape_surrogates(text) != text]
    if broken:
        what = f"{', '.join(broken)}: no text, as it is no UTF-8; it could not be written down, and the run not be resumed"
        raise UserError("E-CONF-01", what, source, "give folders and files names in UTF-8")
    try:
        return cls.model_validate(table)
    except ValidationError as error:
        lines = [_explain(cls, dict(problem)) for problem in error.errors()]
        raise UserError("E-CONF-01", "; ".join(lines), source, "`sdlora config` prints every setting with its value") from None


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("E-CONF-03", f"cannot read this settings file: {error.strerror}", path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError("E-CONF-04", f"not a TOML file: {error}", path) from None
    except RecursionError:
        raise UserError("E-CONF-04", "not a TOML file that can be read: its values are nested too deeply", path) from None


def override(table: dict[str, Any], assignment: str) -> None:
    """Apply one `train.steps=800`; a value that is no TOML value is taken as a string."""
    dotted, equals, text = assignment.partition("=")
    if not equals or not all(dotted.split(".")):
        raise UserError("E-CONF-05", f'"{assignment}" is not of the form a.b=c', "--set", "write for example --set train.steps=800")
    try:
        value = tomllib.loads(f"x={text}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    put(table, dotted, value)


def put(table: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one setting, named as `train.steps`, to a value as it is."""
    *path, last = dotted.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError("E-CONF-05", f'"{part}" holds a value, not a table', dotted)
    table[last] = value


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a table, with the name of the setting that it stands in."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, name)


def _explain(cls: type[Settings], problem: dict[str, Any]) -> str:
    where = [part for part in problem["loc"] if isinstance(part, str)]
    if problem["type"] != "extra_forbidden":
        got = textwrap.shorten(repr(problem["input"]), 100, placeholder=" ...")
        hint = "; take its quotes away" if problem["type"] in ("float_type", "int_type") and isinstance(problem["input"], str) else ""
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')} (got {got}{hint})"
    owner: Any = cls
    for part in where[:-1]:
        owner = owner.model_fields[part].annotation
        owner = next(iter(get_args(owner)), owner)  # a list of tables: the class of one of them
    tables = {name: info.default for name, info in cls.model_fields.items() if isinstance(info.default, Settings)}
    moved = [f"{name}.{where[-1]}" for name, table in tables.items() if where[-1] in type(table).model_fields]
    hint = f"; did you mean {moved[0]}?" if moved else nearest(where[-1], owner.model_fields)
    return f"{'.'.join(where)}: no such setting{hint}"
