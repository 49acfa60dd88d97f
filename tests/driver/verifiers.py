"""Verifiers as users write them: one hangs, one raises, one takes its process with it."""

from __future__ import annotations

import os
import time


def fine(prompt: str, response: str, answer: str) -> float:
    return float(response == answer)


def hang(prompt: str, response: str, answer: str) -> float:
    time.sleep(600)
    return 1.0


def crash(prompt: str, response: str, answer: str) -> float:
    raise KeyError("no such thing")


def die(prompt: str, response: str, answer: str) -> float:
    os._exit(3)


def words(prompt: str, response: str, answer: str) -> float:
    return "one"  # type: ignore[return-value]
