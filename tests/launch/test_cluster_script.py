"""The commands that launch/cluster.sh gives to Ray, with a `ray` that only writes them down."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = """#!/usr/bin/env bash
echo "$RAY_AUTH_MODE $RAY_USAGE_STATS_ENABLED $*" >> "$LOG"
[[ $1 != get-auth-token || -n ${2:-} || -n ${RAY_AUTH_TOKEN:-} ]]
"""


@pytest.fixture
def script(tmp_path: Path):
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text(RAY)
    ray.chmod(0o755)
    log = tmp_path / "log"

    def call(*arguments: str, **env: str) -> tuple[int, list[str], str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env = inherited | {"PATH": f"{ray.parent}:{os.environ['PATH']}", "LOG": str(log)} | env
        done = subprocess.run([ROOT / "launch/cluster.sh", *arguments], env=env, capture_output=True, text=True)
        return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stderr

    return call


def test_a_head_gets_a_token_and_a_dashboard_that_only_it_can_reach(script) -> None:
    code, calls, _ = script("head", "--num-gpus=4")
    assert code == 0 and calls == [
        "token 0 get-auth-token --generate",
        "token 0 start --head --port=6379 --include-dashboard=true --dashboard-host=127.0.0.1 --disable-usage-stats "
        "--num-gpus=4",
    ]


def test_authentication_can_be_turned_off(script) -> None:
    _, calls, _ = script("head", RAY_AUTH_MODE="disabled", DASHBOARD_HOST="0.0.0.0", PORT="7000")
    (start,) = calls
    assert start.startswith("disabled 0 start --head --port=7000") and "--dashboard-host=0.0.0.0" in start


def test_a_worker_joins_with_a_token(script) -> None:
    code, calls, _ = script("worker", "10.0.0.1", "--num-cpus=8", RAY_AUTH_TOKEN="secret")
    assert code == 0 and calls[-1] == "token 0 start --address=10.0.0.1:6379 --num-cpus=8"


def test_a_worker_without_token_or_head_is_refused(script) -> None:
    code, calls, message = script("worker", "10.0.0.1")
    assert code == 2 and "no token here" in message and not any("start" in call for call in calls)
    code, _, message = script("worker", "--block")
    assert code == 2 and "the address of the head is missing" in message


def test_stop_token_and_help(script) -> None:
    assert script("stop")[1] == ["token 0 stop"]
    assert script("token", RAY_AUTH_TOKEN="secret")[1][-1] == "token 0 get-auth-token"
    assert script()[0] == 2
