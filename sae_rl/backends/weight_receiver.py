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
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

GLOO = "gloo"
BUCKET_BYTES = 64 * 2**20


@dataclass(kw_only=True)
class GlooInitInfo(NCCLWeightTransferInitInfo):
    """Where to join the process group: the sender has rank 0, an engine's worker k has rank ``rank_offset + k``."""

    timeout_s: float


def join(info: GlooInitInfo, rank: int) -> ProcessGroupGloo:
    """Joins the transfer's process group. It is separate from torch's default group, which both sides use otherwise."""
    timeout = timedelta(seconds=info.timeout_s)
    store = TCPStore(info.master_address, info.master_port, info.world_size, is_master=rank == 0, timeout=timeout)
    return ProcessGroupGloo(store, rank, info.world_size, timeout)


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


class GlooReceiver(NCCLWeightTransferEngine):
    """vLLM's NCCL engine in each worker process, with gloo in place of NCCL.

    On a CPU vLLM packs linear weights when it loads them, so copying into the parameters would fail; the weights go
    through vLLM's layerwise reload instead, which the NCCL engine starts and finishes.
    """

    init_info_cls = GlooInitInfo

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Joins the process group."""
        self._group = join(init_info, init_info.rank_offset + self.parallel_config.rank)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receives bucket after bucket and loads each into the model."""
        columns = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        metadata = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in columns]
        for bucket in buckets(metadata):
            sizes = [torch.Size(meta.shape).numel() for meta in bucket]
            buffer = torch.empty(sum(sizes), dtype=bucket[0].dtype)
            broadcast(self._group, buffer)
            parts = zip(bucket, buffer.split(sizes), strict=True)
            self.model.load_weights([(meta.name, part.view(meta.shape)) for meta, part in parts])


class WorkerExtension:
    """Empty; vLLM's worker processes import this module to find it."""


WeightTransferEngineFactory.register_engine(GLOO, GlooReceiver)
