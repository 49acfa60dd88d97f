"""Sends the policy's weights to the rollout engines, for ZeRO stages 0 to 3.

    workers/weight_sync.py -> workers/policy.py -> `Sender` -> transfer engine -> worker processes of each rollout engine

The transfer engine implements vLLM's API:

    CPU                                  `GlooSender`, received by `weight_receiver.GlooReceiver`
    GPUs                                 vLLM's NCCL engine
    GPUs shared with rollout engines     vLLM's CUDA IPC engine

It reads the weights from the `Sender`, and calls the rollout engines through `workers.engine_client.EngineClient`.
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


class Sender(WeightSource):
    """The policy's connection to some rollout engines. The transfer engine reads the weights from it, one by one.

    All ranks have one, since gathering ZeRO-3 weights is a collective. Weights have their Hugging Face names. Tied
    embeddings are sent under two names: on a CPU vLLM has an output layer of its own, which would keep old weights.
    """

    def __init__(
        self,
        learner: Learner,
        client: VLLMWeightSyncClient,
        *,
        shares_gpus: bool,
        address: str,
        port: int,
        world_size: int,
        timeout_s: float,
    ) -> None:
        """
        Args:
            shares_gpus: rollout engines run on the learners' GPUs.
            address, port: of the policy's rank 0, where the process group meets.
            world_size: 1 for the sender plus the worker processes of all engines.
        """
        self._learner = learner
        self._pending: Iterator[tuple[str, Tensor]] = iter(())
        causal_lm: Any = learner.network.causal_lm
        names = {id(p): name for name, p in causal_lm.named_parameters()}
        embeddings = names[id(causal_lm.get_input_embeddings().weight)]
        self._tied_name = embeddings if causal_lm.config.tie_word_embeddings else None
        rank = learner.rank.index
        info: TrainerInitInfo
        if shares_gpus:
            info = IPCTrainerInitInfo(rank=rank, packed=True)
        elif learner.rank.device == "cpu":
            info = GlooTrainerInitInfo(address, port, world_size, rank=rank, timeout_s=timeout_s)
        else:
            info = NCCLTrainerInitInfo(address, port, world_size, rank=rank)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self)

    def send(self) -> None:
        """Sends the policy's current weights."""
        self._pending = self._learner.full_weights()
        try:
            self._engine.send_weights()
        finally:
            # If an engine died, some weights remain. This rank gathers them too, since the other ranks do.
            for _ in self._pending:
                pass

    def metadata(self) -> list[ParamMeta]:
        """Name, type and shape of every tensor that iteration yields, in the same order."""
        shapes = self._learner.weight_shapes()
        return [ParamMeta(sent, dtype, shape) for name, dtype, shape in shapes for sent in self._sent_names(name)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._pending:
            for sent_name in self._sent_names(name):
                yield sent_name, tensor

    def _sent_names(self, name: str) -> list[str]:
        name = name.removeprefix("causal_lm.")
        return [name, "lm_head.weight"] if name == self._tied_name else [name]


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
