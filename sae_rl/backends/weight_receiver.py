"""Receives the policy's weights over gloo, inside vLLM's worker processes. `weight_sender` describes the whole path.

vLLM has weight-transfer engines for NCCL and CUDA IPC; this module adds one for CPUs. ``worker_extension_cls`` names its
`WorkerExtension`, so vLLM's workers import the module, which registers the engine.

vLLM inspects every loaded module when a worker starts, and llvmlite's wrappers break that. So nothing that this module
imports may import numba.
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
    """Where to join the process group: the sender has rank 0, an engine's worker k has rank ``rank_offset + k``."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The parameters of one transfer, in the order in which they are sent."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    @classmethod
    def of(cls, metadata: list[ParamMeta]) -> GlooUpdateInfo:
        """From vLLM's metadata of parameters; `metadata` is the inverse."""
        return cls(
            names=[meta.name for meta in metadata],
            dtype_names=[str(meta.dtype).removeprefix("torch.") for meta in metadata],
            shapes=[list(meta.shape) for meta in metadata],
        )

    def metadata(self) -> list[ParamMeta]:
        columns = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in columns]


def join(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """Joins the transfer's process group. It is separate from torch's default group, which both sides use otherwise."""
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    return ProcessGroupGloo(store, rank, world_size, timeout)


def broadcast(group: ProcessGroupGloo, tensor: Tensor) -> None:
    """Sends ``tensor`` from rank 0, and overwrites it on all other ranks."""
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


def buckets(metadata: list[ParamMeta]) -> Iterator[list[ParamMeta]]:
    """Splits parameters into consecutive runs of one type and at most `BUCKET_BYTES`; a larger parameter has its own."""
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
    """vLLM's side of the transfer, in each worker process of an engine.

    On a CPU vLLM packs linear weights when it loads them, so copying into the parameters would fail; the weights go
    through vLLM's layerwise reload instead.
    """

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Joins the process group."""
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = join(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        """Begins the layerwise reload."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receives bucket after bucket and loads each into the model."""
        assert self._group is not None, "init_transfer_engine comes first"
        for bucket in buckets(update_info.metadata()):
            sizes = [torch.Size(meta.shape).numel() for meta in bucket]
            buffer = torch.empty(sum(sizes), dtype=bucket[0].dtype)
            broadcast(self._group, buffer)
            parts = zip(bucket, buffer.split(sizes), strict=True)
            self.model.load_weights([(meta.name, part.view(meta.shape)) for meta, part in parts])

    def finish_weight_update(self) -> None:
        """Ends the layerwise reload."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leaves the process group."""
        self._group = None


class WorkerExtension:
    """Empty; vLLM's worker processes import this module to find it."""


WeightTransferEngineFactory.register_engine(GLOO, GlooReceiver)
