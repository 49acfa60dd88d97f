"""The algorithm: pure functions of tensors, without Ray, vLLM, DeepSpeed, files or logging.

Read in the order of the loop: `segmenters`, `shaping`, `estimators` (over `recursion`), `losses` (over `kl`), `stats`.
"""

from sae_rl.algo.estimators import (
    ESTIMATORS,
    GAE,
    GRPO,
    RLOO,
    SAE,
    Estimator,
    LengthAdaptiveGAE,
    MonteCarlo,
    td_targets,
)
from sae_rl.algo.kl import KL_ESTIMATORS
from sae_rl.algo.losses import LossSum, PolicyLoss, ValueLoss
from sae_rl.algo.recursion import td_recursion, td_recursion_reference
from sae_rl.algo.segmental import segmental_advantages
from sae_rl.algo.segmenters import SEGMENTERS, Delimiter, FixedLength, LowProbability, Random, Segmenter
from sae_rl.algo.shaping import TokenRewards, whiten
from sae_rl.algo.stats import explained_variance, mismatch_stats, rollout_stats, segment_stats

__all__ = [
    "ESTIMATORS",
    "GAE",
    "GRPO",
    "KL_ESTIMATORS",
    "RLOO",
    "SAE",
    "SEGMENTERS",
    "Delimiter",
    "Estimator",
    "FixedLength",
    "LengthAdaptiveGAE",
    "LossSum",
    "LowProbability",
    "MonteCarlo",
    "PolicyLoss",
    "Random",
    "Segmenter",
    "TokenRewards",
    "ValueLoss",
    "explained_variance",
    "mismatch_stats",
    "rollout_stats",
    "segment_stats",
    "segmental_advantages",
    "td_recursion",
    "td_recursion_reference",
    "td_targets",
    "whiten",
]
