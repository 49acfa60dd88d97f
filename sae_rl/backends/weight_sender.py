"""The sending half of weight transfer: the policy's weights, from ZeRO 0 to 3, to every rollout engine.

vLLM's own trainer-side engine sends over NCCL; `GlooSender` does the same over gloo on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from sae_rl.backends.deepspeed import Learner
from sae_rl.backends.weight_receiver import GLOO, GlooInitInfo, GlooUpdateInfo, broadcast, buckets, join
from sae_rl.config.schema import Device

_PREFIX = "causal_lm."


class PolicyWeights(WeightSource):
    """The policy's weights under their Hugging Face names, ZeRO 0 to 3.

    Tied embeddings appear twice: vLLM keeps an output layer of its own on a CPU, and one that is not sent stays old.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._gathered: Iterator[tuple[str, Tensor]] = iter(())
        causal_lm: Any = learner.network.causal_lm
        self._tied = bool(causal_lm.config.tie_word_embeddings)
        names = {id(p): name for name, p in causal_lm.named_parameters()}
        self._input_embeddings = names[id(causal_lm.get_input_embeddings().weight)]

    def metadata(self) -> list[ParamMeta]:
        metadata: list[ParamMeta] = []
        for name, dtype, shape in self._learner.weight_shapes():
            metadata += [ParamMeta(n, dtype, shape) for n in self._sent_names(name)]
        return metadata

    def begin(self) -> None:
        """Before they are asked for once: `finish` has something to gather, even if they never are."""
        self._gathered = self._learner.full_weights()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._gathered:
            for sent_name in self._sent_names(name):
                yield sent_name, tensor

    def finish(self) -> None:
        """Takes part in gathering what an interrupted sender left: other ranks would wait for this one."""
        for _ in self._gathered:
            pass

    def _sent_names(self, name: str) -> list[str]:
        name = name.removeprefix(_PREFIX)
        return [name, "lm_head.weight"] if self._tied and name == self._input_embeddings else [name]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = GLOO

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


class GlooSender(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The policy's side: on every rank, since gathering ZeRO-3 weights is a collective; rank 0 sends."""

    init_info_cls = GlooTrainerInitInfo
    _group: ProcessGroupGloo | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> GlooSender:
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        if init_info.is_sender:
            address, port, size = init_info.master_address, init_info.master_port, init_info.world_size
            info = GlooInitInfo(address, port, 1, size, init_info.timeout_s)
            # Both sides block in the rendezvous, so each needs a thread of its own.
            with ThreadPoolExecutor(max_workers=1) as thread:
                receivers = thread.submit(client.init_weight_transfer_engine, asdict(info))
                sender._group = join(address, port, 0, size, init_info.timeout_s)
                receivers.result()
        return sender

    def send_weights(self) -> None:
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        metadata = self.source.metadata()
        update = GlooUpdateInfo(
            names=[m.name for m in metadata],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in metadata],
            shapes=[list(m.shape) for m in metadata],
        )
        self.client.start_weight_update()
        thread = ThreadPoolExecutor(max_workers=1)
        try:
            received = thread.submit(self.client.update_weights, asdict(update))
            self._send(metadata)
            received.result()
        finally:
            thread.shutdown(wait=False)  # after a failed broadcast the receivers may never return
        self.client.finish_weight_update()

    def _send(self, metadata: list[ParamMeta]) -> None:
        assert self._group is not None and self.source is not None
        weights = iter(self.source)
        for bucket in buckets(metadata):
            # Copied as they come: a gathered ZeRO-3 parameter is gone when the next one is asked for.
            broadcast(self._group, torch.cat([next(weights)[1].detach().flatten().cpu() for _ in bucket]))
        for _ in weights:
            raise AssertionError("the source yields more weights than its metadata says")


def trainer_init_info(
    device: Device, *, shares_gpus: bool, rank: int, address: str, port: int, world_size: int, timeout_s: float
) -> TrainerInitInfo:
    """How the policy's rank opens its side: gloo on CPU; vLLM's own on GPUs, NCCL or, on GPUs that they share, CUDA IPC."""
    if shares_gpus:
        return IPCTrainerInitInfo(rank=rank, packed=True)
    if device == "cpu":
        return GlooTrainerInitInfo(address, port, world_size, timeout_s, rank=rank)
    return NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=rank)


class Sender:
    """The policy's connection to some engines, through which it sends its current weights."""

    def __init__(self, info: TrainerInitInfo, client: VLLMWeightSyncClient, learner: Learner) -> None:
        self.weights = PolicyWeights(learner)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.weights)

    def send(self) -> None:
        self.weights.begin()
        try:
            self._engine.send_weights()
        except Exception:  # an engine died, say: another attempt follows, or the run ends with this error
            self.weights.finish()
            raise


WeightTransferTrainerFactory.register_engine(GLOO, GlooSender)
