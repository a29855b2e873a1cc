"""How long a checkpoint of 50 MB takes: serialised, summed, written, flushed, renamed and read back.

python bench/saving.py [FOLDER]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from sdlora import state
from sdlora.optimizer import groups
from sdlora.optimizers import adamw
from sdlora.state import Progress
from sdlora.train import Learner

PARAMETERS = 50_000_000 // 12
"""Each takes 4 bytes, and two moments of 4 bytes in the optimizer."""


def main() -> None:
    parameter = nn.Parameter(torch.randn(PARAMETERS))
    optimizer = adamw.new(groups([({"all": parameter}, 1e-3)]), adamw.Config())
    parameter.grad = torch.randn(PARAMETERS)
    optimizer.mask(torch.tensor(True))
    optimizer.step()
    learner = Learner("mira", None, {"all": parameter}, optimizer, None, None)  # type: ignore[arg-type]
    seconds = []
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        for step in range(1, 11):
            began = time.monotonic()
            path = state.save(Path(folder), Progress(step), [learner], keep=2)
            seconds.append(time.monotonic() - began)
        size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{size / 1e6:.1f} MB: median {statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s of {len(seconds)}")


if __name__ == "__main__":
    main()
