"""How long each stage took on the way from the command to the first step."""

import time
from dataclasses import dataclass, field

import psutil

from sdlora.events import Event


@dataclass
class Laps:
    """A watch that is pressed at the end of each stage. The first, `process`, is how old the process was: for a command, its imports."""

    seconds: dict[str, float] = field(default_factory=lambda: {"process": time.time() - psutil.Process().create_time()})
    last: float = field(default_factory=time.perf_counter)

    def end(self, stage: str) -> None:
        """A stage ends here; one that comes several times adds up."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def told(self) -> Event:
        """All of them."""
        parts = {stage: round(value, 3) for stage, value in self.seconds.items()}
        said = ", ".join(f"{stage} {value:.1f}" for stage, value in parts.items())
        return Event("note", f"the first step was done after {sum(parts.values()):.1f} s: {said}", data={"startup_s": parts})
