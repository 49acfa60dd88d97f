"""What a training run is made of. `sae_rl.commands.assemble` builds it; the loops read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sae_rl.config.schema import Config
from sae_rl.data.sampler import PromptSampler
from sae_rl.protocols import Recorder, Workers
from sae_rl.records.clock import Clock
from sae_rl.records.warnings import Watch
from sae_rl.rewards.pool import RewardPool
from sae_rl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts of one training run."""

    config: Config
    sampler: PromptSampler  # already in the state of the checkpoint that the run resumes from
    heldout: list[Prompt]
    workers: Workers
    rewards: RewardPool
    records: Recorder
    clock: Clock
    resume_from: Path | None  # a checkpoint; None: a new run
    watch: Watch = field(default_factory=Watch)

    @property
    def checkpoints(self) -> Path:
        return self.config.output_dir / "checkpoints"
