"""Programs of our own that are started: Python that reads and writes UTF-8, whatever encoding this system or this process has."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

NOTHING, READ, AS_STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
"""What a stream may be, beside an open file; one that is not given is this process's own, but nothing is ever to be read from that."""
UTF8 = MappingProxyType({"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"})
"""The second, too: where it is set to another encoding, the first is not enough."""


def start(arguments: Sequence[str], environment: Mapping[str, str] = MappingProxyType({}), **how: Any) -> "subprocess.Popen[Any]":
    """Start `python ARGUMENTS...` with some variables more; what is read from it is text."""
    text = {"encoding": "utf-8", "errors": "replace"} if how.get("stdout") == READ else {}
    return subprocess.Popen([sys.executable, *arguments], env={**os.environ, **environment, **UTF8}, **{"stdin": NOTHING, **text, **how})
