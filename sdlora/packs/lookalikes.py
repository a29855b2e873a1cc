"""Files that go by the name of a pack and are something else: what they look like by their first bytes, and what to do about each."""

from collections.abc import Callable
from dataclasses import dataclass

AGAIN = "fetch it again from where it was published"
TRUSTED = "load it where you trust it, save it again as safetensors with the program that wrote it, and name that file"
SEEN = "open it in a text editor to see what the site answered, and download the file itself: sites may ask for a login first"
POINTED = "run `git lfs pull`, or download the file itself"
UNPACK = "unpack it, and name the .safetensors file inside"
OTHER = "name the .safetensors file of a LoRA"
PROTOCOLS = [bytes([version]) for version in range(2, 6)]
"""Second byte of a pickle."""
GLANCE = 4096
"""Bytes that are looked at."""


@dataclass(frozen=True)
class Lookalike:
    """What a file is instead of a pack."""

    what: str
    todo: str


STARTS: dict[bytes, Lookalike] = {
    b"version https://git-lfs": Lookalike("a pointer to the file in Git LFS, not the file itself", POINTED),
    b"GGUF": Lookalike("a GGUF file, in which other programs keep quantised models", OTHER),
    b"\x1f\x8b": Lookalike("a gzip archive", UNPACK),
    b"7z\xbc\xaf\x27\x1c": Lookalike("a 7z archive", UNPACK),
    b"Rar!": Lookalike("a RAR archive", UNPACK),
    b"\xfd7zXZ\0": Lookalike("an xz archive", UNPACK),
    b"BZh": Lookalike("a bzip2 archive", UNPACK),
    b"\x28\xb5\x2f\xfd": Lookalike("a zstd archive", UNPACK),
    b"\x89PNG": Lookalike("a picture (PNG)", OTHER),
    b"\xff\xd8\xff": Lookalike("a picture (JPEG)", OTHER),
    b"RIFF": Lookalike("a picture or a sound (RIFF)", OTHER),
    b"GIF8": Lookalike("a picture (GIF)", OTHER),
    b"\x89HDF": Lookalike("an HDF5 file", OTHER),
    b"\x93NUMPY": Lookalike("an array of NumPy", OTHER),
    b"%PDF": Lookalike("a PDF", OTHER),
}  # fmt: skip
"""Kinds of files by how they begin."""


def lookalike(content: bytes) -> Lookalike | None:
    """What a file looks like that is no safetensors file; None where nothing is known that begins so."""
    start = content[:GLANCE]
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    tests: list[tuple[bool, Callable[[], Lookalike]]] = [
        (not content, lambda: Lookalike("empty", AGAIN)),
        (not start.strip(b"\0"), lambda: Lookalike("nothing but zeros at its beginning, as a download that broke off leaves it", AGAIN)),
        (start.startswith(b"PK\x03\x04"), lambda: _zip(start)),
        (start[:1] == b"\x80" and start[1:2] in PROTOCOLS, lambda: Lookalike("a pickle, which can run code and is never opened", TRUSTED)),
        (start[257:262] == b"ustar", lambda: Lookalike("a tar archive", UNPACK)),
        (text.startswith(b"<"), lambda: Lookalike("a web page, perhaps one that says why the download failed", SEEN)),
        (text[:1] in (b"{", b"["), lambda: Lookalike(f"JSON: {_shown(text)}", SEEN)),
    ]
    found = next((make() for is_so, make in tests if is_so), None)
    found = found or next((known for begin, known in STARTS.items() if start.startswith(begin)), None)
    return found or (Lookalike(f"text: {_shown(text)}", SEEN) if _is_text(start) else None)


def _zip(start: bytes) -> Lookalike:
    """PyTorch's own files are ZIPs, whose first entry is a pickle."""
    if b"data.pkl" in start:
        return Lookalike("a pickled checkpoint of PyTorch, which can run code and is never opened", TRUSTED)
    return Lookalike("a ZIP", f"{UNPACK}; a bundle is opened with `sdlora pack open`")


def _is_text(start: bytes) -> bool:
    """Whether these bytes are UTF-8 without control characters; the last character may be cut."""
    text = start.decode("utf-8", "ignore")
    whole = len(text.encode()) >= len(start) - (3 if len(start) == GLANCE else 0)
    return whole and all(letter.isprintable() or letter in "\n\r\t" for letter in text)


def _shown(text: bytes) -> str:
    """The first words, on one line."""
    return ascii(" ".join(text[:200].decode("utf-8", "replace").split())[:60])
