"""One vLLM engine: token ids in; token ids, processed logprobs and the version of the weights out."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import AutoTokenizer

from sae_rl.config.schema import Device, ModelConfig, RolloutConfig
from sae_rl.types import FinishReason, Sampling

ALIVE_S = 1.0  # between two looks at whether the engine's process lives
PREFILL_TOKENS = 8192  # prompt tokens that an engine on a CPU reads in one pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to sample."""

    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What came back for one request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the sampled tokens, at the sampling temperature
    text: str
    finish_reason: FinishReason
    weight_versions: tuple[tuple[str, int], ...]  # each version that sampled, and how many tokens it did, in order


class EngineLost(RuntimeError):
    """vLLM's engine died, or cannot go on."""


def prepare_environment(device: Device, threads: int, sockets: str, *, sleeps: bool) -> None:
    """Settings that vLLM reads from the environment, before it is imported.

    Args:
        sockets: a folder for the sockets between its processes, which it does not remove; a short path, as Linux allows
            them 107 characters.
    """
    os.environ["VLLM_RPC_BASE_PATH"] = sockets
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if sleeps:
        # CUDA IPC handles are pickled on their way to vLLM's worker.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if device == "cpu":
        # Engines of one machine must not all bind to the same cores; the number of threads is what we choose.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)


class RolloutEngine:
    """vLLM's ``AsyncLLM`` with the settings that training needs. To be used inside one event loop."""

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        device: Device,
        *,
        sleeps: bool,
        max_model_tokens: int,
        seed: int,
    ) -> None:
        """``sleeps``: it shares its GPU with a learner, and gets weights through CUDA IPC."""
        from vllm import AsyncEngineArgs
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        from sae_rl.backends import weight_receiver

        options: dict[str, Any] = {}
        if device == "cpu" and rollout.tensor_parallel_size == 1:
            # By its class, as vLLM replaces the name "uni" on a CPU: a worker in a process of its own would be waited for by
            # spinning, on a core that others need.
            options["distributed_executor_backend"] = UniProcExecutor
        if rollout.kv_cache_gb is not None:  # on a CPU it is, as was checked with the configuration
            options["kv_cache_memory_bytes"] = int(rollout.kv_cache_gb * 2**30)
        if device == "cpu":
            # vLLM rewinds a seeded generator after a partial prefill, which torch's CPU generators cannot do: the engine
            # dies of it. Without chunks a prefill is never partial.
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(max_model_tokens, PREFILL_TOKENS)
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=model.path,
                dtype=model.precision,
                max_model_len=max_model_tokens,
                max_num_seqs=rollout.max_num_seqs,
                tensor_parallel_size=rollout.tensor_parallel_size,
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                enforce_eager=rollout.enforce_eager,
                # Raw logprobs ignore the temperature: they are not those of the distribution that was sampled from.
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # no sampling defaults from the model's folder
                seed=seed,
                weight_transfer_config=WeightTransferConfig(
                    backend="ipc" if sleeps else {"cpu": weight_receiver.GLOO, "cuda": "nccl"}[device]
                ),
                enable_sleep_mode=sleeps,
                worker_extension_cls=f"{weight_receiver.__name__}.{weight_receiver.WorkerExtension.__name__}",
                disable_log_stats=True,
                **options,
            )
        )
        self._tokenizer = AutoTokenizer.from_pretrained(model.path)
        self._count = 0

    async def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """All requests at once; vLLM batches them. Answers in the order of the requests.

        Raises:
            EngineLost: the engine died.
        """
        with _told_apart():
            return list(await asyncio.gather(*(self._generate_one(request) for request in requests)))

    async def check(self) -> None:
        """Returns when the engine's own process has answered. Raises EngineLost."""
        await self._asked(self._engine.is_paused())

    async def _asked(self, call: Coroutine[Any, Any, Any]) -> None:
        """A call to the engine's process, which vLLM would wait for even if that died. Raises EngineLost."""
        task = asyncio.ensure_future(call)
        while not (await asyncio.wait({task}, timeout=ALIVE_S))[0]:
            if self._engine.errored:
                task.cancel()
                raise EngineLost("vLLM's engine died")
        with _told_apart():
            await task

    async def _generate_one(self, request: Request) -> Sample:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            **asdict(request.sampling),
            seed=request.seed,
            logprobs=0,  # the sampled token's only
            flat_logprobs=True,
            detokenize=False,  # it would decode after every token; the text is only read when it is whole
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._count += 1
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        async for answer in self._engine.generate(prompt, parameters, request_id=str(self._count)):
            if answer.finished:
                return self._sample_of(answer)
        raise RuntimeError(f"vLLM ended request {self._count} without a finished answer")

    def _sample_of(self, answer: Any) -> Sample:
        output = answer.outputs[0]
        token_ids, logprobs = tuple(output.token_ids), tuple(output.logprobs.logprobs)
        assert tuple(output.logprobs.token_ids) == token_ids, "one logprob for each sampled token"
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM finished a request with {output.finish_reason!r}; 'stop' or 'length' was expected"
            )
        return Sample(
            token_ids=token_ids,
            logprobs=logprobs,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=output.finish_reason,
            weight_versions=tuple((span.version, span.end - span.start) for span in output.weight_versions),
        )

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._asked(self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    async def start_weight_update(self) -> None:
        """Responses under way stop between two tokens, and go on with the new weights: keys and values are computed anew."""
        await self._asked(self._engine.pause_generation(mode="keep", clear_cache=True))
        await self._asked(self._engine.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._asked(self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    async def finish_weight_update(self, weight_version: str) -> None:
        await self._asked(self._engine.finish_weight_update(weight_version=weight_version))
        await self._asked(self._engine.resume_generation())

    async def sleep(self) -> None:
        """Leaves the GPU to others: weights go to the host's memory, keys and values are forgotten."""
        await self._asked(self._engine.sleep(level=1))

    async def wake(self) -> None:
        await self._asked(self._engine.wake_up())

    def close(self) -> None:
        self._engine.shutdown()


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """A dead engine as an exception of ours: whoever receives vLLM's would have to import vLLM."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError) as error:
        raise EngineLost(f"vLLM's engine is dead ({error})") from None
