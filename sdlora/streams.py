"""The encodings that this process was given, made such that no letter ends it."""

import io
import os
import sys


def make_streams_safe() -> None:
    """Let whoever writes to a stream write what its encoding lacks escaped, in place of an error.

    What is no console takes UTF-8, unless PYTHONIOENCODING names another encoding.
    """
    named = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if named or stream.isatty() else "utf-8", errors="backslashreplace")


def read_names_as_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where names of files are ASCII to the system, which makes no word of any other letter."""
    if os.name != "nt" and sys.getfilesystemencoding() == "ascii":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
