"""Weights from the policy's ranks to the rollout engines through vLLM's weight-transfer API.

vLLM brings engines for NCCL and CUDA IPC; this file adds one for gloo, so that the same calls work on a CPU. The
receiving half is registered inside vLLM's own worker process, which imports this module because it is named as
``worker_extension_cls``. On a CPU vLLM packs its linear weights at load, so weights must arrive through the layerwise
reload; writing into the parameters fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from sae_rl.backends.deepspeed import Learner
from sae_rl.config import Device

BACKENDS: dict[Device, str] = {"cpu": "gloo", "cuda": "nccl"}
BUCKET_BYTES = 64 * 2**20
_PREFIX = "causal_lm."


class PolicyWeights(WeightSource):
    """The policy's weights under their Hugging Face names, ZeRO 0 to 3.

    Tied embeddings appear twice: vLLM keeps an output layer of its own on a CPU, and one that is not sent stays old.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        causal_lm: Any = learner.network.causal_lm
        self._tied = bool(causal_lm.config.tie_word_embeddings)
        names = {id(p): name for name, p in causal_lm.named_parameters()}
        self._input_embeddings = names[id(causal_lm.get_input_embeddings().weight)]

    def metadata(self) -> list[ParamMeta]:
        metadata: list[ParamMeta] = []
        for name, dtype, shape in self._learner.weight_shapes():
            metadata += [ParamMeta(n, dtype, shape) for n in self._sent_names(name)]
        return metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._learner.full_weights():
            for sent_name in self._sent_names(name):
                yield sent_name, tensor

    def _sent_names(self, name: str) -> list[str]:
        name = name.removeprefix(_PREFIX)
        return [name, "lm_head.weight"] if self._tied and name == self._input_embeddings else [name]


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """The sender is rank 0; an engine's tensor-parallel worker k is rank ``rank_offset + k``."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


def _join(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """A process group beside torch's default one, which each side already uses for itself."""
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    return ProcessGroupGloo(store, rank, world_size, timeout)


def _broadcast(group: ProcessGroupGloo, tensor: Tensor) -> None:
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


def _buckets(metadata: list[ParamMeta]) -> Iterator[list[ParamMeta]]:
    """Consecutive parameters of one type, at most `BUCKET_BYTES` together unless a single one is larger."""
    bucket: list[ParamMeta] = []
    size = 0
    for meta in metadata:
        num_bytes = meta.dtype.itemsize * torch.Size(meta.shape).numel()
        if bucket and (size + num_bytes > BUCKET_BYTES or meta.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(meta)
        size += num_bytes
    if bucket:
        yield bucket


class GlooReceiver(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """vLLM's side: lives in each worker process of an engine."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = _join(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        assert self._group is not None, "init_transfer_engine comes first"
        metadata = [
            ParamMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        ]
        for bucket in _buckets(metadata):
            sizes = [torch.Size(meta.shape).numel() for meta in bucket]
            buffer = torch.empty(sum(sizes), dtype=bucket[0].dtype)
            _broadcast(self._group, buffer)
            pieces = zip(bucket, buffer.split(sizes), strict=True)
            self.model.load_weights([(meta.name, piece.view(meta.shape)) for meta, piece in pieces])

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._group = None


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
                sender._group = _join(address, port, 0, size, init_info.timeout_s)
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
        for bucket in _buckets(metadata):
            # Copied as they come: a gathered ZeRO-3 parameter is gone when the next one is asked for.
            _broadcast(self._group, torch.cat([next(weights)[1].detach().flatten().cpu() for _ in bucket]))
        for _ in weights:
            raise AssertionError("the source yields more weights than its metadata says")


def trainer_init_info(
    device: Device, *, rank: int, address: str, port: int, world_size: int, timeout_s: float
) -> TrainerInitInfo:
    """How the policy's rank opens its side: gloo on CPU, vLLM's own NCCL engine on GPU."""
    if device == "cpu":
        return GlooTrainerInitInfo(address, port, world_size, timeout_s, rank=rank)
    return NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=rank)


def open_sender(info: TrainerInitInfo, client: VLLMWeightSyncClient, learner: Learner) -> Callable[[], None]:
    """Connects to the engines and returns the function that sends the current weights."""
    sender = WeightTransferTrainerFactory.trainer_init(info, client=client, source=PolicyWeights(learner))
    return sender.send_weights


class WorkerExtension:
    """Empty: naming it makes vLLM's worker processes import this module, which registers the engines below."""


if BACKENDS["cpu"] not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKENDS["cpu"], GlooReceiver)
    WeightTransferTrainerFactory.register_engine(BACKENDS["cpu"], GlooSender)
