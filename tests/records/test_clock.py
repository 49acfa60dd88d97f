"""The clock, with the time set by the test."""

from __future__ import annotations

import pytest

from sae_rl.records.clock import Clock


class Hand:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_the_driver_has_the_rest() -> None:
    hand = Hand()
    clock = Clock(hand)
    hand.now += 1
    for seconds in (2, 3):
        with clock.phase("generate"):
            hand.now += seconds
    with clock.phase("update"):
        hand.now += 4
    hand.now += 0.5
    assert clock.lap() == {"time/generate_s": 5, "time/update_s": 4, "time/step_s": 10.5, "time/driver_s": 1.5}
    hand.now += 2
    assert clock.lap() == {"time/step_s": 2, "time/driver_s": 2}, "a lap starts from nothing"
    with clock.phase("workers"):
        hand.now += 26.57
    hand.now += 1
    assert clock.told("ready") == "ready after 27.6 s: workers 26.6, driver 1.0"
    assert clock.lap()["time/step_s"] == 0


def test_a_nested_phase_belongs_to_the_outer_one() -> None:
    hand = Hand()
    clock = Clock(hand)
    with clock.phase("generate"):
        hand.now += 1
    with clock.phase("evaluate"):
        hand.now += 2
        with clock.phase("generate"):
            hand.now += 30
        with clock.phase("reward"), clock.phase("reward"):
            hand.now += 4
    lap = clock.lap()
    assert lap == {"time/generate_s": 1, "time/evaluate_s": 36, "time/step_s": 37, "time/driver_s": 0}


def test_a_failed_phase_counts_and_closes() -> None:
    hand = Hand()
    clock = Clock(hand)
    with pytest.raises(KeyError), clock.phase("sync"):
        hand.now += 3
        raise KeyError
    assert clock.lap()["time/sync_s"] == 3
    with clock.phase("sync"), pytest.raises(AssertionError, match="sync"):
        clock.lap()
