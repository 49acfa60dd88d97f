"""The receiving half of weight transfer over gloo, inside vLLM's own worker processes.

vLLM brings weight-transfer engines for NCCL and CUDA IPC; this is one for gloo, so that the same calls work on a CPU. The
module is named as ``worker_extension_cls``, which makes vLLM's workers import it and so register the engine. On a CPU
vLLM packs its linear weights at load, so weights must arrive through the layerwise reload; writing into the parameters
fails.

It imports nothing of ours that imports numba: vLLM inspects every loaded module when a worker starts, and llvmlite breaks
that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

GLOO = "gloo"
BUCKET_BYTES = 64 * 2**20


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


def join(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """A process group beside torch's default one, which each side already uses for itself."""
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    return ProcessGroupGloo(store, rank, world_size, timeout)


def broadcast(group: ProcessGroupGloo, tensor: Tensor) -> None:
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


def buckets(metadata: list[ParamMeta]) -> Iterator[list[ParamMeta]]:
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
        self._group = join(
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
        for bucket in buckets(metadata):
            sizes = [torch.Size(meta.shape).numel() for meta in bucket]
            buffer = torch.empty(sum(sizes), dtype=bucket[0].dtype)
            broadcast(self._group, buffer)
            pieces = zip(bucket, buffer.split(sizes), strict=True)
            self.model.load_weights([(meta.name, piece.view(meta.shape)) for meta, piece in pieces])

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._group = None


class WorkerExtension:
    """Empty: naming it makes vLLM's worker processes import this module."""


WeightTransferEngineFactory.register_engine(GLOO, GlooReceiver)
