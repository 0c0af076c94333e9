"""launch/train.py, noting what every micro-batch was made of; torchrun starts it in these tests.

TELLTALE_TRACE names a folder. Each line there: step, place of the micro-batch in the global
batch, its sample ids, and a digest of its pixels (so of the crops and flips as well).
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent.parent
sys.path[0] = str(ROOT)

from engines.runtime.command import run_command
from engines.train.trainer import Trainer
from launch.train import main


def trace(folder: Path) -> None:
    next_batch = Trainer.next_batch
    file = os.open(folder / f"{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    seen: dict[str, int] = {"step": -1, "number": 0}

    def traced(self: Trainer) -> Any:
        batch: Any = next_batch(self)
        seen.update(step=self.step, number=seen["number"] + 1 if seen["step"] == self.step else 0)
        place = self.runner.passes[seen["number"]].start
        ids = ",".join(map(str, batch.sample_id.tolist()))
        digest = hashlib.sha256(batch.image.contiguous().numpy().tobytes()).hexdigest()[:16]
        os.write(file, f"{self.step} {place} {ids} {digest}\n".encode())
        return batch

    Trainer.next_batch = traced  # type: ignore[method-assign]


if __name__ == "__main__":
    trace(Path(os.environ["TELLTALE_TRACE"]))
    run_command(main)
