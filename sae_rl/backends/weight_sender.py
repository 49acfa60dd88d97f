"""Sends the policy's weights to the rollout engines, for ZeRO stages 0 to 3.

    workers/weight_sync.py -> workers/policy.py -> `Sender` -> transfer engine -> worker processes of each rollout engine

The transfer engine implements vLLM's API; `trainer_init_info` chooses it:

    CPU                                  `GlooSender`, received by `weight_receiver.GlooReceiver`
    GPUs                                 vLLM's NCCL engine
    GPUs shared with rollout engines     vLLM's CUDA IPC engine

It reads the weights from `PolicyWeights`, and calls the rollout engines through `workers.engine_client.EngineClient`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_common import worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from sae_rl.backends.deepspeed import Learner
from sae_rl.backends.weight_receiver import GLOO, GlooInitInfo, broadcast, buckets, join
from sae_rl.config.schema import Device


class Sender:
    """The policy's connection to some rollout engines. All ranks have one, since gathering ZeRO-3 weights is a collective."""

    def __init__(self, info: TrainerInitInfo, client: VLLMWeightSyncClient, learner: Learner) -> None:
        self.weights = PolicyWeights(learner)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.weights)

    def send(self) -> None:
        """Sends the policy's current weights."""
        self.weights.begin()
        try:
            self._engine.send_weights()
        except Exception:  # for example because an engine died; the caller tries again or ends the run
            self.weights.finish()
            raise


def trainer_init_info(
    device: Device, *, shares_gpus: bool, rank: int, address: str, port: int, world_size: int, timeout_s: float
) -> TrainerInitInfo:
    """Chooses the transfer engine and says how the policy's rank ``rank`` opens its side.

    Args:
        shares_gpus: rollout engines run on the learners' GPUs.
        address, port: of the policy's rank 0, where the process group meets.
        world_size: 1 for the sender plus the worker processes of all engines.
    """
    if shares_gpus:
        return IPCTrainerInitInfo(rank=rank, packed=True)
    if device == "cpu":
        return GlooTrainerInitInfo(address, port, world_size, rank=rank, timeout_s=timeout_s)
    return NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=rank)


class PolicyWeights(WeightSource):
    """The policy's weights under their Hugging Face names.

    Tied embeddings are sent under two names: on a CPU vLLM has an output layer of its own, which would keep old weights.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._pending: Iterator[tuple[str, Tensor]] = iter(())
        causal_lm: Any = learner.network.causal_lm
        self._tied = bool(causal_lm.config.tie_word_embeddings)
        names = {id(p): name for name, p in causal_lm.named_parameters()}
        self._input_embeddings = names[id(causal_lm.get_input_embeddings().weight)]

    def metadata(self) -> list[ParamMeta]:
        """Name, type and shape of every tensor that iteration yields, in the same order."""
        shapes = self._learner.weight_shapes()
        return [ParamMeta(sent, dtype, shape) for name, dtype, shape in shapes for sent in self._sent_names(name)]

    def begin(self) -> None:
        """Prepares one iteration over the weights, so that `finish` works even if it never starts."""
        self._pending = self._learner.full_weights()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._pending:
            for sent_name in self._sent_names(name):
                yield sent_name, tensor

    def finish(self) -> None:
        """Gathers the remaining weights of an interrupted iteration, which the other ranks gather too."""
        for _ in self._pending:
            pass

    def _sent_names(self, name: str) -> list[str]:
        name = name.removeprefix("causal_lm.")
        return [name, "lm_head.weight"] if self._tied and name == self._input_embeddings else [name]


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """Where the policy's rank 0 opens the process group of `GlooSender`."""

    backend: ClassVar[str] = GLOO

    timeout_s: float = field(kw_only=True)


class GlooSender(NCCLTrainerWeightTransferEngine):
    """The policy's side of the transfer: vLLM's NCCL engine, with gloo in place of NCCL.

    Rank 0 sends; other ranks only take part in gathering weights.
    """

    init_info_cls = GlooTrainerInitInfo
    _group: ProcessGroupGloo

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> GlooSender:
        """Opens the connection."""
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        if init_info.is_sender:
            info = GlooInitInfo(
                master_address=init_info.master_address,
                master_port=init_info.master_port,
                rank_offset=1,
                world_size=init_info.world_size,
                timeout_s=init_info.timeout_s,
            )
            # Joining blocks until both sides have joined, so the receivers are called in a thread.
            with ThreadPoolExecutor(max_workers=1) as thread:
                receivers = thread.submit(client.init_weight_transfer_engine, worker_init_payload(info))
                sender._group = join(info, rank=0)
                receivers.result()
        return sender

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        """Called by `send_weights` while the engines receive."""
        if not self.is_sender:
            super()._broadcast(source, meta)
            return
        weights = self._checked_iter(source, meta)
        for bucket in buckets(meta):
            # Copied at once: ZeRO 3 frees a gathered parameter when the next one is requested.
            broadcast(self._group, torch.cat([next(weights)[1].detach().flatten().cpu() for _ in bucket]))
        next(weights, None)  # raises ValueError if the source yields more weights than its metadata lists


WeightTransferTrainerFactory.register_engine(GLOO, GlooSender)
