"""One whole PPO iteration in tokens/s, by phase, with the real Ray, vLLM and DeepSpeed; beside it TRL's, if installed.

    python -m benchmarks.iteration [--peer-python PATH] [--rounds 2] [--steps 4]

64 prompts x 4 responses of exactly 128 tokens by the model of `benchmarks.workload`, one optimizer update of four
micro-batches, in float32; everything else is as ``conf/`` has it for a laptop. Each round starts every program anew and
drops its first iteration; rounds alternate between the programs, so that a ratio compares runs under like load.

TRL runs where `benchmarks/peers/requirements.txt` is installed, by default in /tmp/trl_env, with one thread and with two;
the better one counts. Its PPO evaluates three more networks before the update (reference, values, reward model) and gets
the logprobs from sampling; `sae_rl` evaluates two, policy and values, and a reward function.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import workload as work

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "iteration.json"
PEER_PYTHON = Path("/tmp/trl_env/bin/python")
PHASES = ("generate", "reward", "score", "advantage", "update", "sync", "driver", "step")
OURS = "sae_rl"
LIMIT_S = 1800

Row = dict[str, float]  # seconds by phase of one iteration


@dataclass(frozen=True, slots=True)
class Program:
    """One of the programs that are compared."""

    name: str
    algorithm: str
    threads: int | None  # of one peer process; None: what conf/ says


def programs(with_peers: bool) -> list[Program]:
    peers = [Program(f"TRL {kind.upper()}", kind, threads) for kind in ("ppo", "grpo") for threads in (1, 2)]
    return [Program(OURS, "sae", None), *(peers if with_peers else [])]


def overrides(folder: Path, output: Path, steps: int) -> list[str]:
    """What the benchmark changes of ``conf/train.yaml``."""
    source = [
        f"task.{key}={value}"
        for part in ("train", "evaluation")
        for key, value in (
            (f"{part}.path", folder / "prompts.jsonl"),
            (f"{part}.reward", f"{work.__name__}:{work.parity.__name__}"),
            (f"{part}.columns", "{prompt:prompt,answer:answer,id:id}"),
        )
    ]
    micro_batch_tokens = work.MICRO_BATCH_RESPONSES * (work.MAX_PROMPT_TOKENS + work.RESPONSE_TOKENS)
    learner = [
        f"learner.{role}.{key}={value}"
        for role in ("policy", "critic")
        for key, value in (
            ("num_mini_batches", 1),
            ("micro_batch_tokens", micro_batch_tokens),
            ("optimizer.lr", work.LR),
        )
    ]
    return [
        "name=bench",
        f"output_dir={output}",
        f"steps={steps}",
        "model=local",
        f"model.path={folder / 'model'}",
        "task=dapo_math",  # prompts from a file
        *source,
        f"task.max_prompt_tokens={work.MAX_PROMPT_TOKENS}",
        f"rollout.prompts_per_step={work.NUM_PROMPTS}",
        f"rollout.group_size={work.GROUP_SIZE}",
        f"rollout.max_response_tokens={work.RESPONSE_TOKENS}",
        *learner,
        "learner.critic_pretraining.num_prompts=0",
        "checkpoint.every_steps=0",
        "logger=off",
    ]


def run_ours(folder: Path, steps: int, extra: list[str]) -> list[Row]:
    """``sae-rl train`` in a process of its own; the times that it wrote to metrics.jsonl."""
    with tempfile.TemporaryDirectory() as output:
        run([sys.executable, "-m", "sae_rl", "train", *overrides(folder, Path(output), steps), *extra], {})
        lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    logged = [row for line in lines if (row := json.loads(line))["phase"] == "train"]
    assert all(row["rollout/tokens_mean"] == work.RESPONSE_TOKENS for row in logged), "responses ended early"
    return [{phase: row.get(f"time/{phase}_s", 0.0) for phase in PHASES} for row in logged]


def run_peer(program: Program, python: Path, folder: Path, steps: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as output:
        file = Path(output) / "times.json"
        command = [str(python), "-m", "benchmarks.peers.trl_ppo", program.algorithm, "--workload", str(folder)]
        command += ["--steps", str(steps), "--threads", str(program.threads), "--output", str(file)]
        run(command, {"OMP_NUM_THREADS": str(program.threads)})
        rows: list[Row] = json.loads(file.read_text())
    return rows


def run(command: list[str], env: dict[str, str]) -> None:
    """Runs a program from the repository's root; its output is shown if it fails."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
        raise SystemExit(f"{' '.join(command[:4])} ... failed with {done.returncode}")


def medians(rows: Iterable[Row]) -> Row:
    """By phase; the first row of each program's run has been dropped."""
    rows = list(rows)
    return {phase: statistics.median(row[phase] for row in rows) for phase in PHASES if phase in rows[0]}


def best_threads(figures: dict[Program, list[list[Row]]]) -> dict[str, tuple[Program, Row]]:
    """Of each library's thread counts the one with the shortest iteration."""
    best: dict[str, tuple[Program, Row]] = {}
    for program, rounds in figures.items():
        median = medians(row for rows in rounds for row in rows)
        if program.name not in best or median["step"] < best[program.name][1]["step"]:
            best[program.name] = (program, median)
    return best


def ratios(figures: dict[Program, list[list[Row]]], peer: Program) -> list[float]:
    """Our tokens/s over the peer's, in each round."""
    ours = next(rounds for program, rounds in figures.items() if program.name == OURS)
    pairs = zip(ours, figures[peer], strict=True)
    return [medians(b)["step"] / medians(a)["step"] for a, b in pairs]


def summarize(figures: dict[Program, list[list[Row]]], loads: list[float]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "workload": {
            "prompts": work.NUM_PROMPTS,
            "responses_per_prompt": work.GROUP_SIZE,
            "response_tokens": work.RESPONSE_TOKENS,
            "model": work.shape(),
            "num_parameters": sum(parameter.numel() for parameter in work.build_model(0).parameters()),
        },
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_before_runs": loads,
        },
        "programs": {},
    }
    for name, (program, median) in best_threads(figures).items():
        summary["programs"][name] = {
            "threads": program.threads,
            "seconds": median,
            "tokens_per_s": work.NUM_TOKENS / median["step"],
            "generate_tokens_per_s": work.NUM_TOKENS / median["generate"],
            "sae_rl_is_faster_by": None if name == OURS else statistics.median(ratios(figures, program)),
            "sae_rl_is_faster_by_in_each_round": None if name == OURS else ratios(figures, program),
        }
    summary["all"] = [{"name": p.name, "threads": p.threads, "rounds": rounds} for p, rounds in figures.items()]
    return summary


def table(summary: dict[str, Any]) -> Table:
    shown = Table(title=f"One iteration: {work.NUM_TOKENS:,} response tokens, median seconds")
    for column in ("", "threads", *PHASES, "tokens/s", "generating tokens/s", f"{OURS} is faster by"):
        shown.add_column(column, justify="right" if column else "left")
    for name, found in summary["programs"].items():
        seconds, faster = found["seconds"], found["sae_rl_is_faster_by"]
        shown.add_row(
            name,
            str(found["threads"] or "conf"),
            *(f"{seconds[phase]:.2f}" if phase in seconds else "" for phase in PHASES),
            f"{found['tokens_per_s']:,.0f}",
            f"{found['generate_tokens_per_s']:,.0f}",
            "" if faster is None else f"{faster:.2f}x",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="where TRL is installed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="iterations of one run; the first is not counted")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("extra", nargs="*", help="further overrides for sae-rl, after --")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps: found {options.steps}, allowed: at least 2, as the first is not counted")
    console = Console()
    with_peers = options.peer_python.exists()
    if not with_peers:
        console.print(f"{options.peer_python} is not there, so TRL is left out (benchmarks/peers/requirements.txt)")
    figures: dict[Program, list[list[Row]]] = {program: [] for program in programs(with_peers)}
    loads = []
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # else DeepSpeed, which transformers imports, warns that it found none
    with tempfile.TemporaryDirectory() as name:
        work.make(Path(name), options.steps)
        for turn in range(options.rounds):
            for program in figures:
                loads.append(os.getloadavg()[0])
                console.print(f"round {turn + 1}, {program.name}, threads {program.threads}, load {loads[-1]:.1f}")
                if program.name == OURS:
                    rows = run_ours(Path(name), options.steps, options.extra)
                else:
                    rows = run_peer(program, options.peer_python, Path(name), options.steps)
                figures[program].append(rows[1:])
                console.print("  s per iteration: " + ", ".join(f"{row['step']:.2f}" for row in rows))
    summary = summarize(figures, loads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(summary, indent=1) + "\n")
    console.print(table(summary))
    console.print(f"figures: {options.output}")


if __name__ == "__main__":
    main()
