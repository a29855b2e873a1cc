"""`python -m sdlora.fleet.bound PID ARGUMENTS...`: become `python ARGUMENTS...`, and die with the process PID that asked for it.

So that no job is at work twice: what a dead worker had started would go on beside the attempt that follows it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends a process whose parent has died; it outlasts execve(2)."""


def main(parent: int, arguments: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.name != "nt" and os.getppid() != parent:  # it died before the kernel was told; elsewhere the run's lock alone guards
        sys.exit(128 + signal.SIGKILL)
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
