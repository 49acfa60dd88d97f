import subprocess
import sys
import threading

import pytest

from sae_rl.rewards import REWARDS, resolve_reward


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
    assert REWARDS["math"]("", response, answer) == score


def test_math_works_outside_the_main_thread() -> None:
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.append(REWARDS["math"]("", "\\boxed{2}", "2")))
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_math_refuses_an_answer_that_is_none() -> None:
    with pytest.raises(ValueError, match="the answer '' is not"):
        REWARDS["math"]("", "\\boxed{2}", "")


def test_exact() -> None:
    assert REWARDS["exact"]("", " a b \n", "a b") == 1.0
    assert REWARDS["exact"]("", "a  b", "a b") == 0.0


def test_resolve() -> None:
    assert resolve_reward("level") is REWARDS["level"]
    assert resolve_reward("sae_rl.data.level:level") is REWARDS["level"]
    for name, message in {
        "levle": "did you mean 'level'",
        "zzz": "allowed: countdown, exact, level, math, or an import path",
        "sae_rl.data.level:leven": "did you mean 'level'",
        "no_such_package:f": "cannot import 'no_such_package'",
        ":f": "cannot import ''",
        "sae_rl.data.countdown:LARGEST": "is int, not a function",
    }.items():
        with pytest.raises(ValueError, match=message):
            resolve_reward(name)


def test_data_and_rewards_need_no_heavy_library() -> None:
    code = (
        "import sys, sae_rl.data.prompts, sae_rl.data.sampler, sae_rl.rewards, sae_rl.warm_start\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'math_verify', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
