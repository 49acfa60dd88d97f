"""Receives the policy's weights inside vLLM's worker processes. `weight_sender` describes the whole path.

vLLM has weight-transfer engines for NCCL and CUDA IPC; this module adds one with gloo for CPUs. ``worker_extension_cls``
names its `WorkerExtension`, so vLLM's workers import the module, which registers the engine.

vLLM inspects every loaded module when a worker starts, and llvmlite's wrappers break that. So nothing that this module
imports may import numba.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

from sae_rl.backends.weight_transfer import buckets, checksum, numbers

GLOO = "gloo"


@dataclass(kw_only=True)
class GlooInitInfo(NCCLWeightTransferInitInfo):
    """Where to join the process group: the sender has rank 0, an engine's worker k has rank ``rank_offset + k``."""

    timeout_s: float


class GlooCommunicator:
    """The methods of vLLM's ``PyNcclCommunicator`` that weight transfers use, over gloo.

    Its process group is separate from torch's default group, which both sides use otherwise.
    """

    def __init__(self, info: GlooInitInfo, rank: int) -> None:
        timeout = timedelta(seconds=info.timeout_s)
        store = TCPStore(info.master_address, info.master_port, info.world_size, is_master=rank == 0, timeout=timeout)
        self._group: ProcessGroupGloo | None = ProcessGroupGloo(store, rank, info.world_size, timeout)

    def broadcast(self, tensor: Tensor, src: int, stream: None = None) -> None:
        """Sends ``tensor`` from rank ``src``, and overwrites it on all other ranks. A CPU has no streams."""
        assert self._group is not None, "destroyed"
        options = BroadcastOptions()
        options.rootRank = src
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        """Closes the connections; a broadcast that waits ends with an error on its own."""
        self._group = None


class GlooReceiver(NCCLWeightTransferEngine):
    """vLLM's NCCL engine in each worker process, with gloo in place of NCCL.

    On a CPU vLLM packs linear weights when it loads them, so copying into the parameters would fail; the weights go
    through vLLM's layerwise reload instead, which the NCCL engine starts and finishes.
    """

    init_info_cls = GlooInitInfo

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Joins the process group."""
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.model_update_group = GlooCommunicator(init_info, init_info.rank_offset + self.parallel_config.rank)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receives bucket after bucket and loads each into the model, as vLLM's consumer does on CUDA streams."""
        names, shapes = update_info.names, update_info.shapes
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        for bucket in buckets(sizes, self.packed_buffer_size_bytes):
            at = slice(bucket.start, bucket.stop)
            packed = torch.empty(sum(sizes[at]), dtype=torch.uint8)
            self.model_update_group.broadcast(packed, src=0)
            self.model.load_weights(unpack_tensor(packed, names[at], shapes[at], dtypes[at], sizes[at]))


class WorkerExtension:
    """What vLLM's worker processes can be asked beside their own methods, for the exact check of a weight transfer."""

    weight_transfer_engine: Any  # vLLM's worker has it

    def watch_weights(self) -> None:
        """Notes a checksum of every tensor that the model is given to load from now on, whatever the transport."""
        model = self.weight_transfer_engine.model
        received: list[tuple[str, Tensor]] = []

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Any:
            weights = list(weights)
            received.extend((name, checksum(tensor)) for name, tensor in weights)
            return type(model).load_weights(model, weights)

        model.load_weights = load_weights
        self._received = received

    def received_weights(self) -> tuple[dict[str, int], list[str]]:
        """The checksums that `watch_weights` notes, and the layers that have not got all of their weights yet."""
        return numbers(self._received), unloaded_layers(self.weight_transfer_engine.model)

    def held_weights(self) -> dict[str, int]:
        """A checksum of each parameter that the model holds now. On a CPU vLLM empties the linear layers' parameters."""
        model = self.weight_transfer_engine.model
        return numbers((name, checksum(held)) for name, held in model.named_parameters() if held.numel())


def unloaded_layers(model: nn.Module) -> list[str]:
    """Names of layers that lack weights before vLLM finishes its layerwise reload, which only logs that.

    vLLM keeps the old weights of a layer that got none, and takes uninitialised memory for a part that did not come.
    """
    # The policy's processes import this module too, but not vLLM's models.
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    found = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        expected = sum(get_tensor_load_numel(p) for p in layer._parameters.values() if p is not None)
        # Embeddings are padded to a multiple of 64 rows; the padding is never loaded.
        is_padded = isinstance(layer, VocabParallelEmbedding) and info.load_numel > 0
        if info.can_load() and info.load_numel < expected and not is_padded and not is_deferred_attention_layer(layer):
            found.append(name)
    return found


WeightTransferEngineFactory.register_engine(GLOO, GlooReceiver)
