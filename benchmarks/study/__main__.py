"""The study of docs/study.md, or stages of it. It continues after any kill with the same command.

python -m benchmarks.study [--stages core critics] [--jobs 2] [--minutes 90]
python -m benchmarks.study --list
python -m benchmarks.study --correlate > correlate.sh
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import stdev
from types import FrameType

from benchmarks.study import curves, fidelity
from benchmarks.study.matrix import FILE, Matrix
from benchmarks.study.runner import FAILED, SAE_RL, Runner
from sae_rl.cli import FAILURE, INTERRUPTED, USAGE_ERROR

PILOT = "pilot"
MARGIN = 0.03  # docs/study.md
# Normal quantiles: intervals of 90 % and 95 %, and Holm's smallest level of eight tests, 0.05 / 8; a power of 0.8.
EQUIVALENCE, DIFFERENCE, FIRST_OF_EIGHT = 1.645 + 1.282, 1.960 + 0.842, 2.734 + 0.842


def main(program: Sequence[str] = SAE_RL) -> None:
    """``program`` stands in front of the words of each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", type=Path, default=FILE)
    parser.add_argument("--stages", nargs="+", help="stages of the matrix; without it all but the pilot")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--minutes", type=float, help="start nothing more after so many minutes")
    parser.add_argument("--list", action="store_true", help="say what is finished, failed and left, and stop")
    parser.add_argument("--correlate", action="store_true", help="print the commands that measure fidelity, and stop")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        matrix = Matrix.read(options.matrix)
        if options.correlate:
            return print(*(shlex.join([*program, *words]) for words in fidelity.commands(matrix)), sep="\n")
        stages = options.stages or [stage for stage in matrix.stages if stage != PILOT]
        runner = Runner(matrix, matrix.jobs(stages), program)
        if not options.list:
            runner.run(options.jobs, options.minutes)
    except KeyboardInterrupt:
        end(INTERRUPTED, "interrupted; the same command continues")
    except (ValueError, RuntimeError) as error:
        end(USAGE_ERROR if isinstance(error, ValueError) else FAILURE, f"error: {error}")
    show(runner, stages)
    if PILOT in stages:
        print(variance(matrix, PILOT))


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def end(code: int, message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def show(runner: Runner, stages: Sequence[str]) -> None:
    """Says of each stage how many runs are finished, failed, blocked and left, and why jobs failed."""
    states = runner.states()
    for stage in stages:
        counts = Counter(states[runner.matrix.job_name(run)] for run in runner.matrix.runs(stage))
        print(f"{stage}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    for job in runner.jobs:
        if states[job.name] == FAILED:
            print(f"{job.name}: {curves.read_record(runner.record_file(job))['message']}")


def variance(matrix: Matrix, stage: str) -> str:
    """A table of the paired differences of a stage's arms: their standard deviation s, and the seeds that follow from it."""
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for run in matrix.runs(stage):
        if (file := matrix.curve(run)).exists():
            found.setdefault((run.task, run.size, run.label), {})[run.seed] = curves.area(file)
    lines = [
        "| task, size | arms | seeds | s | seeds for equivalence | seeds for a difference | with Holm's correction |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for (one, areas), (other, others) in combinations(found.items(), 2):
        seeds = sorted(areas.keys() & others.keys())
        if one[:2] == other[:2] and len(seeds) > 1:
            s = stdev(areas[seed] - others[seed] for seed in seeds)
            counts = " | ".join(f"{(z * s / MARGIN) ** 2:.1f}" for z in (EQUIVALENCE, DIFFERENCE, FIRST_OF_EIGHT))
            lines.append(f"| {', '.join(one[:2])} | {one[2]}, {other[2]} | {len(seeds)} | {s:.4f} | {counts} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
