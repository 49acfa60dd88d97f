"""The algorithm: pure functions of tensors, without Ray, vLLM, DeepSpeed, files or logging.

Read in the order of the loop: `segmenters`, `shaping`, `estimators` (over `recursion`), `losses` (over `kl`), `stats`.
"""

from sae_rl.algo.corrections import ImportanceCorrection
from sae_rl.algo.estimators import (
    ESTIMATORS,
    GAE,
    GRPO,
    RLOO,
    SAE,
    Estimator,
    LengthAdaptiveGAE,
    MonteCarlo,
    estimate,
    td_targets,
)
from sae_rl.algo.kl import KL_ESTIMATORS
from sae_rl.algo.losses import LossSum, PolicyLoss, PolicyTokens, ValueLoss
from sae_rl.algo.recursion import td_recursion, td_recursion_reference
from sae_rl.algo.segmental import segmental_advantages
from sae_rl.algo.segmenter_sets import SEGMENTERS, MinimumLength, Union, with_vocabulary
from sae_rl.algo.segmenters import (
    AdaptiveProbability,
    Delimiter,
    Entropy,
    FixedLength,
    LowProbability,
    Random,
    Segmenter,
    Surprisal,
    segment,
)
from sae_rl.algo.shaping import TokenRewards, Whitening
from sae_rl.algo.stats import (
    advantage_stats,
    critic_stats,
    explained_variance,
    mismatch_stats,
    probability_stats,
    rollout_stats,
    segment_stats,
)

__all__ = [
    "ESTIMATORS",
    "GAE",
    "GRPO",
    "KL_ESTIMATORS",
    "RLOO",
    "SAE",
    "SEGMENTERS",
    "AdaptiveProbability",
    "Delimiter",
    "Entropy",
    "Estimator",
    "FixedLength",
    "ImportanceCorrection",
    "LengthAdaptiveGAE",
    "LossSum",
    "LowProbability",
    "MinimumLength",
    "MonteCarlo",
    "PolicyLoss",
    "PolicyTokens",
    "Random",
    "Segmenter",
    "Surprisal",
    "TokenRewards",
    "Union",
    "ValueLoss",
    "Whitening",
    "advantage_stats",
    "critic_stats",
    "estimate",
    "explained_variance",
    "mismatch_stats",
    "probability_stats",
    "rollout_stats",
    "segment",
    "segment_stats",
    "segmental_advantages",
    "td_recursion",
    "td_recursion_reference",
    "td_targets",
    "with_vocabulary",
]
