import subprocess
import sys
import threading

import pytest

from sae_rl.rewards.exact import Exact
from sae_rl.rewards.function import Function
from sae_rl.rewards.table import READY, VERIFIERS, resolve
from sae_rl.rewards.verdict import Sample, Verdict, Verifier
from sae_rl.rewards.weighted import Weighted


def judged(verifier: str | Verifier, response: str, answer: str) -> Verdict:
    found = READY[verifier] if isinstance(verifier, str) else verifier
    return found(Sample(prompt="", response=response, answer=answer))


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("so \\boxed{4}", "4", 1.0),
        ("\\boxed{1}, hence \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{4} or rather \\boxed{5}", "4", 0.0),  # the last one counts
        ("the answer is 7", "7", 1.0),
        ("the answer is 8", "7", 0.0),
        ("\\boxed{x+1}", "$1+x$", 1.0),
        ("\\boxed{3", "4", 0.0),
        ("no number", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_math(response: str, answer: str, score: float) -> None:
    assert judged("math", response, answer).score == score


def test_math_works_outside_the_main_thread() -> None:
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.append(judged("math", "\\boxed{2}", "2").score))
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_math_refuses_an_answer_that_is_none() -> None:
    with pytest.raises(ValueError, match="the answer '' is not"):
        judged("math", "\\boxed{2}", "")


def test_exact() -> None:
    assert judged("exact", " a b \n", "a b") == Verdict(1.0, "equal", "a b")
    assert judged("exact", "a  b", "a b").score == 0.0
    assert judged("exact", "A b", "a b").score == 0.0
    assert judged(Exact(ignore_case=True), "A b", "a B") == Verdict(1.0, "equal", "a b")


def test_weighted() -> None:
    both = Weighted((READY["math"], READY["exact"]), (1.0, 0.25))
    assert judged(both, "2", "2").score == 1.25
    verdict = judged(both, "4/2", "2")
    assert (verdict.score, verdict.answer) == (1.0, "2")
    assert verdict.why == "1 x 1 (found 4/2, which equals 2); 0.25 x 0 (not equal)"
    for parts, weights in (((), ()), ((READY["math"],), (1.0, 2.0)), ((READY["math"],), (float("nan"),))):
        with pytest.raises(ValueError, match="weights"):
            Weighted(parts, weights)


def test_resolve() -> None:
    mine = Exact(ignore_case=True)
    assert resolve("level", {}) is READY["level"]
    assert resolve("mine", {"mine": mine}) is mine
    assert resolve("math", {"math": mine}) is mine, "a configuration may redefine a name"
    assert resolve("sae_rl.tasks.level:level", {}) == Function("sae_rl.tasks.level:level")
    for name, message in {
        "levle": "did you mean 'level'",
        "mien": "did you mean 'mine'",
        "zzz": "allowed: choice, code, countdown, exact, level, math, math_verify, mine, numeric, reasoning_gym, or package",
        "weighted": "needs knobs: give it a name in rewards.verifiers",
        "sae_rl.tasks.level:leven": "did you mean 'level'",
        "no_such_package:f": "cannot import 'no_such_package:f'",
        ":f": "cannot import ':f'",
        "sae_rl.tasks.countdown:LARGEST": "is int, not a function",
    }.items():
        with pytest.raises(ValueError, match=message):
            resolve(name, {"mine": mine})


def test_ready_verifiers_are_members_of_the_table() -> None:
    assert {type(verifier) for verifier in READY.values()} <= set(VERIFIERS.values())


def test_data_and_rewards_need_no_heavy_library() -> None:
    code = (
        "import sys, sae_rl.data.prompts, sae_rl.data.sampler, sae_rl.rewards.table, sae_rl.sft\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'math_verify', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_a_process_that_checks_starts_without_torch() -> None:
    """It may be started in the middle of a step; sae_rl.cli is what multiprocessing imports into it as the main module."""
    heavy = {"torch", "pydantic", "sympy", "numba"}
    code = f"import sys, sae_rl.cli, sae_rl.rewards.check\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
