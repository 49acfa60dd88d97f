r"""Mathematical answers checked per second, beside math-verify by itself.

    python -m benchmarks.verifiers [--answers 10000] [--rounds 3]

10,000 responses to 1,250 questions: a few sentences with mathematics, and a final answer in a box. Half of the answers are
integers, the others fractions, decimals, percentages, roots, formulas, tuples, sets and intervals; each is written in one of
several forms, and a third is wrong. "math-verify" is `verify(parse(answer), parse(response))` with its defaults in one
process. "sae_rl" is the verifier `math`, by itself in one process, and through the reward pool with its deadline, as training
runs it, with one process and with two. Programs take turns, every turn has answers of its own, so that nobody remembers them;
best times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from math_verify import parse, verify
from rich.console import Console
from rich.table import Table

from benchmarks.turns import take_turns
from sae_rl.rewards.math.verifier import Math
from sae_rl.rewards.pool import RewardPool, sample_of
from sae_rl.rewards.verdict import Failed, Verdict
from sae_rl.types import Prompt, Rollout

RESULTS = Path(__file__).parent / "results" / "verifiers.json"
GROUP_SIZE, WRONG_FRACTION = 8, 1 / 3
PEER, DIRECT = "math-verify", "sae_rl, direct"
POOLS = {1: "sae_rl, pool of 1", 2: "sae_rl, pool of 2"}
SENTENCES = [
    "Let us write $f(x) = x^2 - {a}x + {b}$ and look at its roots.",
    "Since {a} + {b} = {c}, there are {c} cases in all.",
    "We substitute $y = \\frac{{{a}}}{{{b}}}$ and simplify.",
    "Wait, the {a} of them that we counted twice must be taken away again.",
    "By symmetry, it is enough to look at $n \\le {c}$.",
    "So \\[ S = \\sum_{{k=1}}^{{{a}}} k = {b}. \\]",
]


@dataclass(frozen=True, slots=True)
class Answer:
    """A right answer, other ways to write it, and ones that are wrong."""

    text: str
    forms: list[str]
    wrong: list[str]


def integer(rng: random.Random) -> Answer:
    n = rng.choice([rng.randint(-20, 1000), rng.randint(1000, 10**7)])
    return Answer(str(n), [str(n), f"{n:,}", f"x = {n}", f"{n} \\text{{ cm}}", f"{n}.0"], [str(n + 1), str(-n - 1)])


def quotient(rng: random.Random) -> Answer:
    ratio = Fraction(rng.randint(1, 60), rng.choice([3, 7, 8, 9, 11, 16]))
    n, d = ratio.numerator, ratio.denominator
    return Answer(
        f"\\frac{{{n}}}{{{d}}}",
        [f"\\frac{{{n}}}{{{d}}}", f"{n}/{d}", f"\\dfrac{{{2 * n}}}{{{2 * d}}}"],
        [f"{n + 1}/{d}"],
    )


def decimal(rng: random.Random) -> Answer:
    n = rng.randint(1, 999)
    return Answer(f"{n / 100:.2f}", [f"{n / 100:.2f}", f"\\frac{{{n}}}{{100}}", f"{n}\\%"], [f"{(n + 1) / 100:.2f}"])


def root(rng: random.Random) -> Answer:
    a, b = rng.randint(2, 9), rng.choice([2, 3, 5, 7])
    return Answer(
        f"{a}\\sqrt{{{b}}}", [f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}"], [f"{a + 1}\\sqrt{{{b}}}", f"{a}\\pi"]
    )


def formula(rng: random.Random) -> Answer:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    expanded = f"x^2 + {a + b}x + {a * b}"
    return Answer(
        expanded, [expanded, f"(x+{a})(x+{b})", f"{a * b} + {a + b}x + x^2"], [f"x^2 + {a + b + 1}x + {a * b}"]
    )


def several(rng: random.Random) -> Answer:
    a, b = rng.randint(-9, 9), rng.randint(10, 20)
    left, right = rng.choice([("(", ")"), ("[", "]"), ("[", ")"), ("\\{", "\\}")])
    text = f"{left}{a}, {b}{right}"
    return Answer(text, [text, f"\\left{left} {a},{b} \\right{right}"], [f"{left}{a}, {b + 1}{right}"])


KINDS: list[Callable[[random.Random], Answer]] = [integer] * 5 + [quotient, decimal, root, formula, several]


def make(num_answers: int, seed: int) -> list[tuple[Rollout, bool]]:
    """Rollouts, and whether each is right."""
    rng = random.Random(seed)
    made: list[tuple[Rollout, bool]] = []
    while len(made) < num_answers:
        answer = rng.choice(KINDS)(rng)
        prompt = Prompt(id=f"q{len(made)}", text="", token_ids=(1,), answer=answer.text, task="math", reward="math")
        for sample in range(min(GROUP_SIZE, num_answers - len(made))):
            right = rng.random() >= WRONG_FRACTION
            final = rng.choice(answer.forms if right else answer.wrong)
            numbers = {"a": rng.randint(2, 40), "b": rng.randint(2, 40), "c": rng.randint(40, 90)}
            text = " ".join(sentence.format(**numbers) for sentence in rng.choices(SENTENCES, k=8))
            made.append((rollout(prompt, sample, f"{text} The answer is $\\boxed{{{final}}}$."), right))
    return made


def rollout(prompt: Prompt, sample: int, text: str) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample=sample,
        token_ids=torch.tensor([1]),
        rollout_logprobs=torch.zeros(1),
        text=text,
        finish_reason="stop",
        policy_versions=torch.zeros(1, dtype=torch.int64),
        temperature=1.0,
    )


def by_math_verify(rollouts: list[Rollout]) -> list[bool]:
    return [verify(parse(f"\\boxed{{{each.prompt.answer}}}"), parse(each.text)) for each in rollouts]


def direct(rollouts: list[Rollout]) -> list[bool]:
    judge = Math()
    return [judge(sample_of(each)).score == 1.0 for each in rollouts]


def through(pool: RewardPool) -> Callable[[list[Rollout]], list[bool]]:
    return lambda rollouts: [right(outcome) for outcome in pool.collect(pool.submit(rollouts)).outcomes]


def right(outcome: Verdict | Failed) -> bool:
    return isinstance(outcome, Verdict) and outcome.score == 1.0


@contextlib.contextmanager
def programs() -> Iterator[dict[str, Callable[[list[Rollout]], list[bool]]]]:
    with contextlib.ExitStack() as stack:
        found = {PEER: by_math_verify, DIRECT: direct}
        for size, name in POOLS.items():
            pool = RewardPool(
                num_processes=size,
                deadline_s=30.0,
                memory_gb=2.0,
                failed_score=0.0,
                max_failed_fraction=0.0,
                verifiers={},
            )
            found[name] = through(stack.enter_context(pool))
        yield found


def measure(num_answers: int, rounds: int) -> dict[str, Any]:
    """One turn of every program warms up; each turn has answers of its own."""
    turns = [make(num_answers, seed) for seed in range(rounds + 1)]
    errors: dict[str, int] = {}

    def taking_turns(name: str, program: Callable[[list[Rollout]], list[bool]]) -> Callable[[], None]:
        ahead = iter(turns)
        errors[name] = 0

        def turn() -> None:
            made = next(ahead)
            found = program([rollout for rollout, _ in made])
            errors[name] += sum(verdict != expected for verdict, (_, expected) in zip(found, made, strict=True))

        return turn

    with programs() as found:
        seconds = take_turns({name: taking_turns(name, program) for name, program in found.items()}, rounds)
    return summarize(num_answers, seconds, {name: n / (num_answers * len(turns)) for name, n in errors.items()})


def summarize(num_answers: int, seconds: dict[str, list[float]], errors: dict[str, float]) -> dict[str, Any]:
    best = {name: min(runs) for name, runs in seconds.items()}
    return {
        "answers": num_answers,
        "programs": {
            name: {
                "best_s": best[name],
                "seconds": seconds[name],
                "answers_per_s": num_answers / best[name],
                "times_math_verify": best[PEER] / best[name],
                "wrong_verdicts": errors[name],
            }
            for name in seconds
        },
    }


def show(results: dict[str, Any]) -> Table:
    table = Table("", "s", "answers/s", "times math-verify", "wrong verdicts", title=f"{results['answers']:,} answers")
    for name, one in results["programs"].items():
        table.add_row(
            name,
            f"{one['best_s']:.2f}",
            f"{one['answers_per_s']:,.0f}",
            f"{one['times_math_verify']:.2f}x",
            f"{100 * one['wrong_verdicts']:.2f} %",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    for knob in ("answers", "rounds"):
        if vars(options)[knob] < 1:
            parser.error(f"--{knob}: found {vars(options)[knob]}, allowed: at least 1")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    results = {"machine": machine, **measure(options.answers, options.rounds)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(show(results))
    print(f"figures: {options.output}")


if __name__ == "__main__":
    main()
