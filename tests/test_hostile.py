"""Files that mean harm, or were harmed: refused with one line, within bounded time and memory, before a module is replaced."""

import json
import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from sdlora.adapter import Bank
from sdlora.errors import BAD_INPUT, UserError
from sdlora.family import Family
from sdlora.packs import file, strict

Table = dict[str, Any]


def parts(path: Path) -> tuple[Table, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(header: bytes | Table, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data


def edit(change: Callable[[Table, str], Any]) -> Callable[[Path], bytes]:
    """The header changed; `change` gets it and the name of the tensor that lies first."""

    def make(path: Path) -> bytes:
        header, data = parts(path)
        change(header, min((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"][0]))
        return whole(header, data)

    return make


def text(change: Callable[[bytes], bytes]) -> Callable[[Path], bytes]:
    def make(path: Path) -> bytes:
        header, data = parts(path)
        return whole(change(json.dumps(header, separators=(",", ":")).encode()), data)

    return make


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], bytes]:
    return lambda path: change(path.read_bytes())


def renamed(new: str) -> Callable[[Path], bytes]:
    return edit(lambda header, first: header.update({new: header.pop(first)}))


def field(name: str, value: Any) -> Callable[[Path], bytes]:
    return edit(lambda header, first: header[first].update({name: value}))


def twice(path: Path) -> bytes:
    header, data = parts(path)
    key = next(key for key in header if key != "__metadata__")
    again = f"{json.dumps(key)}:{json.dumps(header[key])}"
    return whole(f"{json.dumps(header)[:-1]},{again}}}".encode(), data)


def many(_: Path) -> bytes:
    entries = {f"lora_unet_x{i}.alpha": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    return whole(entries, b"")


def shift(begin: int, end: int) -> Callable[[Path], bytes]:
    def change(header: Table, first: str) -> None:
        offsets = header[first]["data_offsets"]
        header[first]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return edit(change)


HARM: dict[str, Callable[[Path], bytes]] = {
    "105 trailing bytes": raw(lambda content: content + b"\0"),
    "104 zeros": raw(lambda content: bytes(len(content))),
    "104 zeros behind the header": lambda path: whole(parts(path)[0], bytes(len(parts(path)[1]))),
    **{f"106 length {n}": raw(lambda c, n=n: n.to_bytes(8, "little") + c[8:]) for n in (2**63, 100_000_001, 99_000_000, 0, 1)},  # type: ignore[misc]
    "107 no JSON": text(lambda header: header[:-1] + b"]"),
    "107 an array": lambda _: whole(b'[{"a":1}]', b""),
    "107 no UTF-8": text(lambda header: header.replace(b"lora", b"l\xffra", 1)),
    "107 deep": lambda _: whole(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "107 NaN": text(lambda header: header.replace(b'"shape":[', b'"shape":[NaN,', 1)),
    "108 gap": shift(0, 2), "108 overlap": shift(-2, 0), "108 backwards": field("data_offsets", [8, 0]),
    "108 floats": field("data_offsets", [0.0, 8.0]), "108 bools": field("data_offsets", [False, True]),
    "109 overflow": field("shape", [2**40, 2**40]), "110 zero times much": field("shape", [0, 2**62]),
    "109 negative": field("shape", [-1, -8]),
    "111 twice": twice,
    "112 leading space": text(lambda header: b" " + header), "112 further field": field("more", 1),
    "113 many of no size": many,
    "114 long key": renamed("lora_unet_" + "a" * 1_000_000), "114 NUL": renamed("lora_unet_\0.alpha"), "114 path": renamed("../x.alpha"),
    "115 dunder": renamed("x.__class__"),
    "116 number": edit(lambda header, _: header["__metadata__"].update({"ss_steps": 3})),
    "116 list": edit(lambda header, _: header.update({"__metadata__": []})),
    "116 script": edit(lambda header, _: header["__metadata__"].update({"modelspec.title": "<script>alert(1)</script>"})),
    "120 LFS": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "119 page": lambda _: b"<html>404</html>", "117 pickle": lambda _: b"\x80\x04N.", "118 zip": lambda _: b"PK\x03\x04" + bytes(99),
    "unknown dtype": field("dtype", "F8_E4M3"), "dtype list": field("dtype", ["F16"]),
    "a flipped bit": raw(lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]),
}  # fmt: skip


def refusal(path: Path, loaded: Family) -> UserError | None:
    """What is said of a file, and that it replaced nothing; None if it was taken, and is off again."""
    before, bank = small.modules(loaded), Bank(loaded.components)
    try:
        file.attach(file.load(path), "bad", bank, loaded)
    except UserError as error:
        assert small.modules(loaded) == before
        return error
    bank.eject()
    return None


@pytest.mark.parametrize("name", HARM)
def test_harm_is_refused(name: str, pack_path: Path, loaded: Family, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HARM[name](pack_path))
    error = refusal(path, loaded)
    assert error is not None
    assert error.exit_code == BAD_INPUT
    assert len(str(error)) < 2000
    assert refusal(pack_path, loaded) is None, "the control"


def test_a_sparse_giant_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "giant.safetensors"
    with path.open("wb") as opened:
        os.truncate(opened.fileno(), 20 * 2**30)
    with pytest.raises(UserError, match="E-PACK-01"):
        file.load(path)


def mutated(header: bytes, data: bytes, rng: np.random.Generator) -> bytes:
    """One to three mutations of bytes, words or keys."""
    words = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"-1", b"1e9", b"null", b"true", b".alpha", b"F32", b"9" * 30, b"\\u0000"]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(header)))
        way = int(rng.integers(0, 4))
        if way == 0:
            header = header[:at] + bytes([int(rng.integers(0, 256))]) + header[at + 1 :]
        elif way == 1:
            header = header[:at] + words[int(rng.integers(0, len(words)))] + header[at:]
        elif way == 2:
            header = header[:at] + header[at + int(rng.integers(1, 20)) :]
        else:
            digits = [i for i in range(len(header)) if header[i : i + 1].isdigit()]
            place = digits[int(rng.integers(0, len(digits)))] if digits else at
            header = header[:place] + str(int(rng.integers(0, 10))).encode() + header[place + 1 :]
    return whole(header, data)


def test_a_thousand_mutations_are_taken_or_refused(pack_path: Path) -> None:
    """The header and keys alone: no other error than ours, no more memory than the file's own size a few times over."""
    table, data = parts(pack_path)
    header, rng = json.dumps(table, separators=(",", ":")).encode(), np.random.Generator(np.random.Philox(key=103))
    met: Counter[str] = Counter()
    for i in range(1000):
        if i == 970:  # tracing is slow
            tracemalloc.start()
        content = mutated(header, data, rng)
        try:
            strict.parse(content, "fuzz")
            met["taken"] += 1
        except UserError as error:
            met[error.code] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(met.values()) == 1000
    assert set(met) == {"taken", "E-PACK-03"}, met
    assert met["E-PACK-03"] > 500
    assert peak < 20 * (len(header) + len(data)) + 2**20


def test_mutations_that_parse_are_applied_or_refused(pack_path: Path, loaded: Family, tmp_path: Path) -> None:
    table, data = parts(pack_path)
    order = random.Random(130)
    path, met = tmp_path / "odd.safetensors", Counter[str]()
    keys = [key for key in table if key != "__metadata__"]
    for _ in range(40):
        changed = {key: dict(value) for key, value in table.items()}
        changed["__metadata__"] = {}
        one, two = order.sample(keys, 2)
        way = order.randrange(4)
        if way == 0:
            changed[one], changed[two] = changed[two], changed[one]
        elif way == 1:
            changed[f"{one[: order.randrange(1, len(one))]}.{order.choice(['alpha', 'hada_t1', 'lokr_t2', 'diff', 'oft_diag'])}"] = (
                changed.pop(one)
            )
        elif way == 2:
            changed[one]["shape"] = [*changed[one]["shape"][::-1]]
        else:
            changed[one]["dtype"] = order.choice(["I16", "F16", "BF16"])
        path.write_bytes(whole(changed, data))
        error = refusal(path, loaded)
        met["taken" if error is None else error.code] += 1
    assert sum(met.values()) == 40
    assert len(met) > 2
