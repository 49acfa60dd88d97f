"""Verifiers as users write them: one hangs, one raises, one takes its process with it, one its memory."""

from __future__ import annotations

import os
import time

from sae_rl.rewards.verdict import Verdict


def fine(prompt: str, response: str, answer: str) -> float:
    return float(response == answer)


def talkative(prompt: str, response: str, answer: str) -> Verdict:
    return Verdict(0.5, f"half of {prompt}", response)


def hang(prompt: str, response: str, answer: str) -> float:
    time.sleep(600)
    return 1.0


def crash(prompt: str, response: str, answer: str) -> float:
    raise KeyError("no such thing")


def die(prompt: str, response: str, answer: str) -> float:
    os._exit(3)


def words(prompt: str, response: str, answer: str) -> float:
    return "one"  # type: ignore[return-value]


def nan(prompt: str, response: str, answer: str) -> float:
    return float("nan")


def swell(prompt: str, response: str, answer: str) -> float:
    return float(len(bytearray(4 * 10**9)))
