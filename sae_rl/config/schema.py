"""A whole run as one frozen tree. Hydra composes it from ``conf/``; it is validated here, once, before any process starts.

Defaults live in ``conf/`` where a reader of a configuration looks for them; a field has a default here only where
leaving it out has one obvious meaning.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator

from sae_rl.algo.estimators import ESTIMATORS, Estimator
from sae_rl.algo.losses import PolicyLoss, ValueLoss
from sae_rl.algo.segmenter_sets import SEGMENTERS
from sae_rl.algo.segmenters import Segmenter
from sae_rl.algo.shaping import TokenRewards, Whitening
from sae_rl.data.sources import TaskConfig
from sae_rl.rewards.table import VERIFIERS
from sae_rl.rewards.verdict import Verifier
from sae_rl.settings import Fraction, NonNegative, Positive, Section, member_of, tree_of
from sae_rl.types import Sampling

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]


class AlgorithmConfig(Section):
    segmenter: Annotated[Segmenter, PlainValidator(member_of(SEGMENTERS))]
    estimator: Annotated[Estimator, PlainValidator(member_of(ESTIMATORS, requires="needs_critic"))]
    token_rewards: TokenRewards
    policy_loss: PolicyLoss
    value_loss: ValueLoss
    whitening: Whitening
    bootstrap_truncated: bool  # a response cut at the length limit goes on with V, or else ends there

    @property
    def needs_critic(self) -> bool:
        return self.estimator.needs_critic

    @property
    def needs_reference(self) -> bool:
        return self.token_rewards.kl_coef > 0 or self.policy_loss.kl_coef > 0

    @property
    def needs_entropies(self) -> bool:
        return self.advantages_need_entropies or self.policy_loss.entropy_coef != 0

    @property
    def advantages_need_entropies(self) -> bool:
        """A plug-in that does not read them need not say so."""
        return any(bool(getattr(part, "needs_entropies", False)) for part in (self.segmenter, self.estimator))


class ModelConfig(Section):
    path: str  # a local Hugging Face folder, one of our checkpoints, or a hub name such as Qwen/Qwen3-8B-Base
    precision: Precision  # of weights and activations; DeepSpeed keeps fp32 master weights beside bfloat16
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    logprobs: Literal["chunked", "cut_cross_entropy"]  # how they are computed without all logits; see logprobs.py
    context_tokens: Positive | None = None  # null: max_position_embeddings of the model's config.json

    @field_validator("path")
    @classmethod
    def _policy_of_a_checkpoint(cls, path: str) -> str:
        inside = Path(path) / "hf"
        return str(inside) if inside.is_dir() else path

    @property
    def is_hub_name(self) -> bool:
        return not Path(self.path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", self.path) is not None

    def read_context_tokens(self) -> int:
        """Longest prompt + response that the model takes.

        Raises:
            ValueError: the folder or its config.json is missing or unreadable.
        """
        if self.context_tokens is not None:
            return self.context_tokens
        if self.is_hub_name:
            raise ValueError(
                f"model.path: no folder {self.path!r} here; to load that name from the hub, state its context length "
                "in model.context_tokens"
            )
        if not Path(self.path).is_dir():
            raise ValueError(
                f"model.path: no folder {self.path!r}; make one with `sae-rl warm-start`, or correct the path"
            )
        file = Path(self.path) / "config.json"
        try:
            return int(json.loads(file.read_text())["max_position_embeddings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"model.path: cannot read max_position_embeddings from {file}: {error!r}") from error


class WorkersConfig(Section):
    num_workers: NonNegative
    cpus_per_worker: Annotated[float, Field(gt=0)]
    threads_per_worker: Positive  # of torch and OpenMP in each process


class ClusterConfig(Section):
    address: str | None  # null: start a local Ray; auto, HOST:PORT or ray://...: join one
    device: Device
    rollout: WorkersConfig  # one vLLM engine per worker
    policy: WorkersConfig
    critic: WorkersConfig  # started if the estimator needs values
    reference: WorkersConfig  # started if a KL term needs it
    peak_tflops: Annotated[float, Field(gt=0)] | None  # of one GPU in model.precision, dense; null: MFU is not logged
    share_learner_gpus: bool  # rank i of policy, critic and reference live on one GPU
    colocate_rollout: bool  # and an engine too, which sleeps while the learners work
    start_timeout_s: Annotated[float, Field(gt=0)]
    call_timeout_s: Annotated[float, Field(gt=0)]  # of any one remote call


class DynamicSamplingConfig(Section):
    """Groups that teach something: DAPO (arXiv 2503.14476) samples others for those whose responses all score alike."""

    mode: Literal["none", "filter", "resample"]  # filter: groups are left out; resample: and others take their places
    by: Literal["variance", "success_rate"]  # keep a group whose rewards differ, or whose mean reward is in the window
    success_low: float  # the window's ends, both included
    success_high: float
    oversampling: Annotated[float, Field(ge=1)]  # prompts asked for / groups still missing
    max_rounds: Positive  # of sampling in one step; after them the step trains on the groups that it has


class SamplingConfig(Section):
    """How tokens are drawn; anything but a temperature changes the distribution that vLLM's logprobs are of."""

    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: NonNegative  # 0: all tokens
    min_p: Fraction
    repetition_penalty: Annotated[float, Field(gt=0)]  # 1: none
    presence_penalty: float  # 0: none
    frequency_penalty: float  # 0: none

    def sampling(self, max_tokens: int) -> Sampling:
        return Sampling(max_tokens=max_tokens, **{name: getattr(self, name) for name in SamplingConfig.model_fields})


class RolloutConfig(SamplingConfig):
    prompts_per_step: Positive
    prompts_under_way: Positive | None  # above prompts_per_step: partial rollouts; null: a step waits for its own
    group_size: Positive  # responses per prompt
    max_response_tokens: Positive
    temperature: Annotated[float, Field(gt=0)]
    tensor_parallel_size: Positive
    max_num_seqs: Positive  # responses that one engine decodes at the same time
    kv_cache_gb: Annotated[float, Field(gt=0)] | None  # on CPU; on GPU null: what gpu_memory_utilization leaves
    gpu_memory_utilization: Fraction
    enforce_eager: bool
    dynamic_sampling: DynamicSamplingConfig
    health_timeout_s: Annotated[float, Field(gt=0)]  # for an engine's process to answer between two of its steps
    max_engine_losses: NonNegative  # in the run: dead or silent engines, which are replaced; one more ends it
    logprob_tolerance: Annotated[float, Field(gt=0)]  # nats, vLLM against the trainer after a weight sync


class ScheduleConfig(Section):
    """Whether responses are sampled while others are learnt from."""

    mode: Literal["synchronous", "overlapped"]
    max_staleness: NonNegative  # steps between the weights that begin a batch and the policy that learns from it
    scoring_parts: (
        Positive  # synchronous: in how many parts values and logprobs are computed, beside sampling; 1: behind it
    )
    weight_updates: Literal["drained", "in_flight"]  # wait for responses under way, or let them go on with new weights


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)]
    betas: tuple[Fraction, Fraction]
    eps: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_updates: NonNegative  # lr rises linearly over the first so many
    schedule: Literal["constant", "linear", "cosine"]  # of lr behind the warm-up, until the run's last update
    min_lr_fraction: Fraction  # of lr, at the end of a linear or cosine schedule
    max_grad_norm: Annotated[float, Field(gt=0)]
    max_skipped_updates: NonNegative  # in a row, whose gradient is not finite; one more ends the run


class LearnerConfig(Section):
    zero_stage: Literal[0, 1, 2, 3]
    offload_optimizer: bool
    offload_parameters: bool
    activation_checkpointing: bool
    num_epochs: Positive  # passes over the batch of one step
    num_mini_batches: Positive  # optimizer updates per epoch
    micro_batch_tokens: Positive  # prompt + response tokens of one forward pass per rank; those that share rows add up
    optimizer: OptimizerConfig


class LoraConfig(Section):
    """Adapters on a frozen policy (arXiv 2106.09685); the critic is trained whole."""

    rank: NonNegative  # 0: no adapters, all weights are trained
    alpha: Annotated[float, Field(gt=0)]  # what the adapters add counts alpha / rank
    target_modules: Literal["all-linear"] | tuple[str, ...]  # or names of layers, such as [q_proj, v_proj]


class CriticPretrainingConfig(Section):
    """Value pre-training on rollouts of the frozen policy, before the first policy update (arXiv 2503.01491)."""

    checkpoint: str | None  # folder of a critic to start from instead, as `sae-rl pretrain-critic` leaves it
    num_prompts: NonNegative  # 0: none
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)]  # of the prompts
    responses_per_update: Positive
    lr: Annotated[float, Field(gt=0)]
    max_epochs: Positive
    patience: Positive  # epochs without a better held-out explained variance before it stops
    lr_decay: Annotated[float, Field(gt=0, le=1)]  # factor on the learning rate after each epoch


class LearnersConfig(Section):
    policy: LearnerConfig
    critic: LearnerConfig
    lora: LoraConfig
    sequence_parallel_size: Positive  # ranks that share each row of tokens (Ulysses), of every learner
    critic_pretraining: CriticPretrainingConfig


class RewardsConfig(Section):
    """How responses are checked. A failed check crashed, or overran its deadline or its memory: no wrong answer."""

    num_processes: Positive
    deadline_s: Annotated[float, Field(gt=0)]  # of one check; its process is killed
    memory_gb: Annotated[float, Field(gt=0)]  # that one process may allocate
    failed: Literal["leave_out", "score"]  # of training: a response whose check failed is not learnt from, or scores
    failed_score: float  # this; in an evaluation always
    max_failed_fraction: Fraction  # of a step's checks; above it the run stops
    verifiers: dict[str, Annotated[Verifier, PlainValidator(member_of(VERIFIERS))]]  # by the name that sources use


class EvaluationConfig(SamplingConfig):
    every_steps: NonNegative  # 0: never; always before the first and after the last step otherwise
    samples_per_prompt: Positive  # n of avg@n and maj@n; pass@k is for k up to n
    pass_score: float  # a sample passes with this score or a higher one
    record_samples: bool  # of evaluations in training, one parquet file each


class CheckpointConfig(Section):
    every_steps: NonNegative  # 0: only at the end
    keep_last: Positive


class LoggerConfig(Section):
    console: Literal["rich", "plain", "off"]
    jsonl: bool
    tensorboard: bool
    wandb: Literal["auto", "offline", "off"]  # auto: online if an API key is there, offline otherwise
    wandb_project: str
    rollouts_every_steps: NonNegative  # parquet files of every response; 0: none


class Config(Section):
    name: str
    output_dir: Path
    seed: NonNegative
    steps: NonNegative
    replay: Path | None  # a run's folder: learn from its recorded rollouts, without rollout engines
    resume: bool  # continue from the newest checkpoint in output_dir if there is one
    algorithm: AlgorithmConfig
    model: ModelConfig
    task: TaskConfig
    cluster: ClusterConfig
    rollout: RolloutConfig
    schedule: ScheduleConfig
    learner: LearnersConfig
    rewards: RewardsConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    logger: LoggerConfig

    @property
    def responses_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def needs_reference_workers(self) -> bool:
        """Under adapters the reference is the policy without them."""
        return self.algorithm.needs_reference and not self.learner.lora.rank


def as_tree(config: Config) -> dict[str, Any]:
    """The configuration as plain values, in the form that it was read from."""
    tree = config.model_dump(mode="json")
    tree["algorithm"]["segmenter"] = tree_of(config.algorithm.segmenter, SEGMENTERS)
    tree["algorithm"]["estimator"] = tree_of(config.algorithm.estimator, ESTIMATORS)
    tree["rewards"]["verifiers"] = {name: tree_of(v, VERIFIERS) for name, v in config.rewards.verifiers.items()}
    return tree
