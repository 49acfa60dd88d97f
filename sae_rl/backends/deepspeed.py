"""A network in a DeepSpeed engine: scores of ragged batches, optimizer updates, checkpoints, full weights.

Each rank's process has one `Learner`. Every public method is a collective: all ranks call it with the same batch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sae_rl.algo.losses import LossSum
from sae_rl.backends.flops import BACKWARD, PassCost
from sae_rl.backends.lora import merged_weights
from sae_rl.backends.lr_schedule import LrSchedule
from sae_rl.backends.packing import MicroBatch, Prompts, build_micro_batch, pack
from sae_rl.backends.projection import Projection
from sae_rl.backends.sequence_parallel import SequenceGroup
from sae_rl.config.schema import Device, LearnerConfig, ModelConfig
from sae_rl.types import Batch

BUCKET_NUMBERS = 250_000_000  # in a bucket of gradients: in float32 as many bytes as DeepSpeed's default in bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """This process within its data-parallel group."""

    index: int
    size: int
    master_address: str
    master_port: int
    device: Device
    threads: int
    sequence_parallel_size: int = 1  # ranks, consecutive by index, that share each row


def join_group(rank: Rank) -> None:
    """Sets up torch and the role's process group: gloo on CPUs, NCCL on GPUs."""
    os.environ.update(
        RANK=str(rank.index),
        WORLD_SIZE=str(rank.size),
        LOCAL_RANK="0",  # Ray hides the GPUs of other workers
        MASTER_ADDR=rank.master_address,
        MASTER_PORT=str(rank.master_port),
    )
    if rank.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(rank.threads)
    import deepspeed

    # DeepSpeed would spend minutes compiling a shared-memory all-reduce, which training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = {"cpu": "gloo", "cuda": "nccl"}[rank.device]
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def zero_stage(config: LearnerConfig, model: ModelConfig, trainable: bool) -> int:
    """The ZeRO stage that DeepSpeed runs, which may differ from the configured one."""
    if not trainable and config.zero_stage in (1, 2):
        return 0  # these stages shard gradients and optimizer states, which a frozen network does not have
    if trainable and config.zero_stage == 0 and model.precision == "bfloat16":
        return 1  # DeepSpeed accumulates bfloat16 gradients in float32 from here on
    return config.zero_stage


class Learner:
    """One rank of a network that DeepSpeed ZeRO trains or evaluates."""

    def __init__(
        self,
        build: Callable[[SequenceGroup | None], nn.Module],
        model: ModelConfig,
        config: LearnerConfig,
        rank: Rank,
        *,
        num_steps: int | None,
    ) -> None:
        """
        Args:
            build: makes the network; its argument is the group of ranks that share rows, or None.
            num_steps: steps of the run, for the learning-rate schedule; None if the network is not trained.
        """
        import deepspeed
        from transformers import PreTrainedModel
        from transformers.integrations import HfDeepSpeedConfig

        from sae_rl.backends.attention import shares_prompts  # imports transformers' attention

        self.config = config
        self.rank = rank
        self.device = torch.device(rank.device)
        self._num_skipped = 0  # consecutive skipped updates
        trainable = num_steps is not None
        self._stage = zero_stage(config, model, trainable)
        self._clips_itself = trainable and self._stage == 0
        ds_config = self._deepspeed_config(model, trainable)
        # While this object lives, from_pretrained shards the weights as it loads them.
        sharded_load = HfDeepSpeedConfig(ds_config) if self._stage == 3 else None
        self._group = SequenceGroup(rank.sequence_parallel_size) if rank.sequence_parallel_size > 1 else None
        network = build(self._group)
        self._cost = PassCost.of(network)
        self._shares_prompts = shares_prompts(network)
        del sharded_load
        self._has_frozen = not all(parameter.requires_grad for parameter in network.parameters())
        if config.activation_checkpointing and trainable:
            for module in network.modules():
                if isinstance(module, PreTrainedModel):
                    module.gradient_checkpointing_enable()
        optimizer = None
        if num_steps is not None:
            options = config.optimizer
            self.schedule = LrSchedule(options, num_steps * config.num_epochs * config.num_mini_batches)
            optimizer = torch.optim.AdamW(
                [parameter for parameter in network.parameters() if parameter.requires_grad],
                lr=options.lr,
                betas=options.betas,
                eps=options.eps,
                weight_decay=options.weight_decay,
                fused=True,  # torch's own kernel for GPUs and CPUs; DeepSpeed's are compiled when a run starts
            )
            if self._clips_itself:
                optimizer.register_step_pre_hook(self._clip)
        else:
            network.requires_grad_(False)
        self.engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=ds_config)
        self.network = self.engine.module

    def _deepspeed_config(self, model: ModelConfig, trainable: bool) -> dict[str, Any]:
        stage = self._stage
        # DeepSpeed refuses to overlap under ZeRO 1, because `_backward` has no fixed number of micro-batches.
        zero: dict[str, Any] = {"stage": stage, "overlap_comm": stage == 3, "reduce_bucket_size": BUCKET_NUMBERS}
        if stage >= 1 and self.config.offload_optimizer and trainable:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.rank.device == "cuda"}
        if stage == 3 and self.config.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.rank.device == "cuda"}
        return {
            # DeepSpeed requires batch sizes, but `update` normalises the loss by the tokens of the whole mini-batch.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0 if self._clips_itself else self.config.optimizer.max_grad_norm,
            "bf16": {"enabled": model.precision == "bfloat16"},
            # In bfloat16, the gradients of a few tokens would be rounded away beside the sum of many micro-batches.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Clips gradients for ZeRO 0 in float32, where DeepSpeed clips but does not report the norm."""
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.max_grad_norm)
        self._grad_norm = float(norm)
        if not math.isfinite(self._grad_norm):  # skips the update, as DeepSpeed's own optimizers do
            for parameter in self.network.parameters():
                parameter.grad = None

    @property
    def _reports(self) -> bool:
        """Whether this rank returns results; ranks that share rows all have the same ones."""
        return self._group is None or self._group.index == 0

    @property
    def grad_norm(self) -> float:
        """Norm of the last update's gradient before clipping."""
        return self._grad_norm if self._clips_itself else float(self.engine.get_global_grad_norm())

    def _micro_batches(self, batch: Batch, rows: Tensor) -> Iterator[tuple[MicroBatch, bool]]:
        """Yields this rank's share of ``rows`` as micro-batches, and whether each of them counts.

        All ranks get the same number of micro-batches, since every pass runs ZeRO's collectives: a rank with too few
        rows repeats one, and that pass does not count. Ranks that share rows get the same micro-batches.
        """
        lengths, group_size = batch.prompt_lengths + batch.lengths, self.rank.sequence_parallel_size
        budget, num_groups = self.config.micro_batch_tokens * group_size, self.rank.size // group_size
        prompts = Prompts.of(batch) if self._shares_prompts else None
        parts = pack(rows, lengths, budget, num_groups, self._cost.attention_tokens, prompts)
        for part in parts[self.rank.index // group_size]:
            counts = part.numel() > 0
            yield build_micro_batch(batch, part if counts else rows[:1], prompts).to(self.device), counts

    @torch.no_grad()
    def score(
        self, batch: Batch, forward: Callable[[MicroBatch], dict[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs ``forward`` over the batch.

        Returns:
            token_index (n,), the indices of this rank's tokens among the batch's N, and their results (n,) by name.
        """
        self.engine.eval()
        parts: list[dict[str, Tensor]] = []
        for micro, counts in self._micro_batches(batch, torch.arange(batch.num_responses)):
            results = forward(micro) | {"token_index": micro.token_index}
            if counts and self._reports:
                parts.append({name: numbers.cpu() for name, numbers in results.items()})
        if not parts:
            return torch.empty(0, dtype=torch.int64), {}
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return joined.pop("token_index"), joined

    def projected_gradients(
        self, batch: Batch, outputs: Callable[[MicroBatch], Tensor], weights: Tensor, dimension: int, seed: int
    ) -> Tensor:
        """The gradients of E weighted sums of outputs, from one forward and E backward passes of each micro-batch.

        Beside the weights it needs memory for the activations of a micro-batch, which are kept for all backward passes
        (there is no activation checkpointing here), and for one gradient in the weights' own type.

        Args:
            outputs: (n,) of a micro-batch, from `network` itself: the engine's own forward would have a backward pass
                accumulate gradients for the optimizer.
            weights: (E, N) of each sum.
            dimension, seed: as of `Projection`.

        Returns:
            (E, D) float64, the projections of this rank's part; the sum over all ranks is that of the gradient.
        """
        assert self._stage < 3, "under ZeRO 3 no rank has whole weights between its passes"
        self.engine.eval()
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        project = Projection(parameters, dimension, seed)
        sums = torch.zeros(len(weights), project.dimension, dtype=torch.float64)
        for micro, counts in self._micro_batches(batch, torch.arange(batch.num_responses)):
            if not counts:
                continue
            flat = outputs(micro)
            for number, row in enumerate(weights[:, micro.token_index.cpu()].to(flat)):
                if bool(row.any()):
                    gradients = torch.autograd.grad(flat, parameters, row, retain_graph=True, allow_unused=True)
                    sums[number] += project(gradients)
        return sums

    def update(
        self, batch: Batch, rows: Tensor, loss: Callable[[MicroBatch], LossSum], total: float
    ) -> dict[str, float]:
        """One optimizer update on the responses ``rows``.

        The loss is ``sum over the tokens of all ranks / total``, independent of ranks and micro-batches.

        Returns:
            Sums over this rank's micro-batches: the statistics of ``loss`` by metric name, ``tokens`` (sampled ones),
            model ``flops``, ``real_positions`` (tokens of rows) and ``positions`` (with padding and repeated rows). Also
            ``grad_norm``, ``lr``, ``seconds`` and ``peak_memory_gb``.

        Raises:
            FloatingPointError: too many consecutive updates had a non-finite gradient.
        """
        started = time.perf_counter()
        totals = self._backward(batch, rows, loss, total)
        lr = self._step()
        return totals | {
            "grad_norm": self.grad_norm,
            "lr": lr,
            "seconds": time.perf_counter() - started,
            "peak_memory_gb": self.peak_memory_gb(),
        }

    def _backward(
        self, batch: Batch, rows: Tensor, loss: Callable[[MicroBatch], LossSum], total: float
    ) -> dict[str, float]:
        """Accumulates the gradient; returns the sums that `update` describes."""
        self.engine.train()
        totals = dict.fromkeys(("tokens", "positions", "real_positions", "flops"), 0.0)
        for micro, counts in self._micro_batches(batch, rows):
            summed = loss(micro)
            # DeepSpeed averages gradients over ranks; a loss that is a sum needs their sum.
            scale = self.rank.size / total if counts else 0.0
            self.engine.backward(summed.sum * scale)
            if not self._reports:
                continue
            totals["positions"] += micro.input_ids.numel() + -micro.input_ids.numel() % self.rank.sequence_parallel_size
            if counts:
                forward = self._cost.forward(micro.lengths, micro.token_ids.numel(), micro.shared)
                totals["flops"] += (1 + BACKWARD) * forward
                totals["tokens"] += micro.token_ids.numel()
                totals["real_positions"] += micro.input_ids.numel()
                for name, value in summed.stats.items():
                    totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def _step(self) -> float:
        """Applies the gradient, or skips it if it is not finite; returns the learning rate."""
        lr, options = self.schedule.next(), self.config.optimizer
        for group in self.engine.optimizer.param_groups:
            # A loaded checkpoint brings the options that it was saved with; the configuration's are used instead.
            group.update(lr=lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)
        self.engine.step()
        is_skipped = not math.isfinite(self.grad_norm)
        if is_skipped and self.config.offload_optimizer and self._stage in (1, 2):
            self.engine.optimizer.averaged_gradients.clear()  # DeepSpeed 0.19.8 would add the next gradients to these
        self._num_skipped = self._num_skipped + 1 if is_skipped else 0
        if self._num_skipped > options.max_skipped_updates:
            raise FloatingPointError(
                f"the gradient's norm is {self.grad_norm} in update {self.engine.global_steps}, as in the "
                f"{self._num_skipped - 1} before, which were skipped (optimizer.max_skipped_updates = "
                f"{options.max_skipped_updates}); lower learner.*.optimizer.lr or max_grad_norm, set "
                "model.precision=float32, or look at the rewards, values and logprobs of the batch"
            )
        return lr

    def save(self, folder: Path) -> list[str]:
        """Writes this rank's shard of weights and optimizer, and its schedule and random state; returns its files."""
        progress = {"num_scheduled": self.schedule.num_done}
        self.engine.save_checkpoint(
            str(folder), "state", progress, save_latest=False, exclude_frozen_parameters=self._has_frozen
        )
        random_state = {"cpu": torch.get_rng_state()}  # dropout continues after a resume as in an uninterrupted run
        if self.rank.device == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state()
        file = folder / f"random_state_{self.rank.index}.pt"
        torch.save(random_state, file)
        # The stage decides which ranks write weights and optimizer states. DeepSpeed says it in these two attributes.
        weights = [self.engine._get_ckpt_name(folder, "state")] if self.engine.save_non_zero_checkpoint else []
        optimizer = [self.engine._get_zero_ckpt_name(folder, "state")] if self.engine.save_zero_checkpoint else []
        return [str(file), *weights, *optimizer]

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            ValueError: the checkpoint is incomplete or was written by a different number of ranks.
        """
        path, progress = self.engine.load_checkpoint(str(folder), "state", load_module_strict=not self._has_frozen)
        if path is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint that {self.rank.size} ranks can load")
        self.schedule.num_done = progress["num_scheduled"]
        state = torch.load(folder / f"random_state_{self.rank.index}.pt")
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full tensor) of every parameter, with adapters merged in.

        Under ZeRO 3 each parameter is gathered when its turn comes, and freed when the next one is requested.
        """
        import deepspeed

        for weight in merged_weights(self.network):
            if self._stage == 3:
                with deepspeed.zero.GatheredParameters(weight.parts):
                    yield weight.name, weight.read()
            else:
                yield weight.name, weight.read()

    def weight_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, type, full shape) of every tensor that `full_weights` yields, without gathering."""
        found = [(weight.name, weight.parameter) for weight in merged_weights(self.network)]
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in found]  # ds_shape: ZeRO 3's

    def peak_memory_gb(self) -> float:
        """Peak memory of the GPU, or on a CPU of this process."""
        if self.rank.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        status = Path("/proc/self/status").read_text()  # getrusage may report the parent process's peak
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20

    def release_memory(self) -> None:
        """Gives the GPU's unused memory, which torch keeps for later, to the other processes on the GPU."""
        if self.rank.device == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
