"""What measuring costs: tokens and seconds of each stage, in a file that outlives a kill, and lines about its progress."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sae_rl.whole_files import whole_file


@dataclass(frozen=True, slots=True)
class Spent:
    """What a stage has cost so far."""

    tokens: int = 0
    seconds: float = 0.0


def spent(file: Path, stage: str) -> Spent:
    """What the stage has cost, over all starts."""
    stages = json.loads(file.read_text()) if file.exists() else {}
    return Spent(**stages[stage]) if stage in stages else Spent()


@dataclass(frozen=True, slots=True)
class Progress:
    """Adds up what a stage costs, and prints a line for each of its parts."""

    file: Path
    note: Callable[[str], None]
    stage: str
    what: str  # what a part is, in the plural
    num_parts: int

    def add(self, num_done: int, tokens: int, seconds: float) -> None:
        """One more part is done, and ``num_done`` of them altogether, those of earlier starts included."""
        before = spent(self.file, self.stage)
        now = Spent(before.tokens + tokens, before.seconds + seconds)
        stages = json.loads(self.file.read_text()) if self.file.exists() else {}
        with whole_file(self.file) as temporary:
            temporary.write_text(json.dumps(stages | {self.stage: asdict(now)}, indent=2) + "\n")
        left = now.seconds / num_done * (self.num_parts - num_done)
        self.note(
            f"{self.stage}: {num_done:,} of {self.num_parts:,} {self.what}, {now.tokens:,} tokens in {now.seconds / 60:.1f} "
            f"min, about {left / 60:.1f} min left"
        )
