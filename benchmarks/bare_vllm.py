"""vLLM alone on the workload: for each line that it reads it calls `LLM.generate` and prints "done".

    python -m benchmarks.bare_vllm --workload FOLDER --threads 2

Unlike the pool of engines it computes no logprobs and has no seeds of requests, and its prompts are texts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import workload as work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bare_") as sockets:  # vLLM does not remove them
        serve(options.workload, options.threads, sockets)


def serve(workload: Path, threads: int, sockets: str) -> None:
    os.environ |= {
        "VLLM_RPC_BASE_PATH": sockets,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(workload / "model"),
        dtype="float32",
        max_model_len=work.MAX_PROMPT_TOKENS + work.RESPONSE_TOKENS,
        max_num_seqs=work.NUM_RESPONSES,
        kv_cache_memory_bytes=2 * 2**30,
        enforce_eager=True,
    )
    parameters = SamplingParams(n=work.GROUP_SIZE, temperature=1.0, max_tokens=work.RESPONSE_TOKENS)
    lines = (workload / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][: work.NUM_PROMPTS]
    while sys.stdin.readline():
        answers = engine.generate(prompts, parameters, use_tqdm=False)
        assert sum(len(o.token_ids) for a in answers for o in a.outputs) == work.NUM_TOKENS, "responses ended early"
        print("done", flush=True)


if __name__ == "__main__":
    main()
