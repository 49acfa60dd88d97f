"""One whole PPO iteration in tokens/s, by phase, with the real Ray, vLLM and DeepSpeed; beside it TRL's, if installed.

    python -m benchmarks.iteration [--peer-python PATH] [--rounds 2] [--steps 4]

64 prompts x 4 responses of exactly 128 tokens by the model of `benchmarks.workload`, one optimizer update of sixteen
micro-batches, in float32; everything else is as ``conf/`` has it for a laptop. Each round starts every program anew and
drops its first iteration; rounds alternate between the programs, so that a ratio compares runs under like load.

TRL runs where `benchmarks/peers/requirements.txt` is installed, by default in .venv-peers, with one thread and with two;
the better one counts. Where others use the cores, two threads wait for each other at every operation and a run can take
ten times as long: ``--peer-threads 1`` leaves them out. Its PPO evaluates three more networks before the update
(reference, values, reward model) and gets the logprobs from sampling; `sae_rl` evaluates two, policy and values, and a
reward function.
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
PEER_PYTHON = Path(".venv-peers/bin/python")
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


def programs(peers: list[str], threads: list[int]) -> list[Program]:
    return [Program(OURS, "sae", None), *(Program(f"TRL {kind.upper()}", kind, n) for kind in peers for n in threads)]


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


def raw(figures: dict[Program, list[list[Row]]]) -> list[dict[str, Any]]:
    """Every iteration that counts, by program and round."""
    return [{"name": p.name, "threads": p.threads, "rounds": rounds} for p, rounds in figures.items()]


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
    summary["all"] = raw(figures)
    return summary


def table(summary: dict[str, Any]) -> Table:
    """A column for each program; seconds by phase, then what follows from them."""
    shown = Table(title=f"One iteration: {work.NUM_TOKENS:,} response tokens, median seconds")
    found = summary["programs"]
    shown.add_column("")
    for name, figures in found.items():
        threads = figures["threads"]
        shown.add_column(name if threads is None else f"{name}, {threads} thread{'s' * (threads > 1)}", justify="right")
    for phase in PHASES:
        seconds = [figures["seconds"].get(phase) for figures in found.values()]
        shown.add_row(phase, *("" if s is None else f"{s:.2f}" for s in seconds), end_section=phase in PHASES[-2:])
    shown.add_row("tokens/s", *(f"{figures['tokens_per_s']:,.0f}" for figures in found.values()))
    shown.add_row("tokens/s of generate", *(f"{figures['generate_tokens_per_s']:,.0f}" for figures in found.values()))
    faster = [figures["sae_rl_is_faster_by"] for figures in found.values()]
    shown.add_row(f"{OURS} is faster by", *("" if f is None else f"{f:.2f}x" for f in faster))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="where TRL is installed")
    parser.add_argument("--peers", nargs="*", choices=("ppo", "grpo"), default=["ppo", "grpo"])
    parser.add_argument("--peer-threads", nargs="+", type=int, default=[1, 2], help="2 is only fair on idle cores")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="iterations of one run; the first is not counted")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("extra", nargs="*", help="further overrides for sae-rl, after --")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps: found {options.steps}, allowed: at least 2, as the first is not counted")
    console = Console()
    peers = options.peers if options.peer_python.exists() else []
    if options.peers and not peers:
        console.print(f"{options.peer_python} is not there, so TRL is left out (benchmarks/peers/requirements.txt)")
    figures: dict[Program, list[list[Row]]] = {program: [] for program in programs(peers, options.peer_threads)}
    loads = []
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # else DeepSpeed, which transformers imports, warns that it found none
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_suffix(".partial.json")  # what an interrupted benchmark leaves
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
                partial.write_text(json.dumps({"load_before_runs": loads, "all": raw(figures)}, indent=1) + "\n")
                console.print("  s per iteration: " + ", ".join(f"{row['step']:.2f}" for row in rows))
    summary = summarize(figures, loads)
    options.output.write_text(json.dumps(summary, indent=1) + "\n")
    partial.unlink()
    console.print(table(summary))
    console.print(f"figures: {options.output}")


if __name__ == "__main__":
    main()
