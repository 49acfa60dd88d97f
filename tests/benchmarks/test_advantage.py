"""The benchmark of advantages: what it times computes the same thing, and its figures are what they are called."""

import pytest
import torch

from benchmarks import advantage
from sae_rl.algo import td_recursion


@pytest.fixture(scope="module")
def work() -> advantage.Workload:
    return advantage.make(16, 200)


def test_the_workload_is_what_the_page_says(work: advantage.Workload) -> None:
    large = advantage.make(512, 1024)
    assert large.opens.double().mean() == pytest.approx(advantage.OPENS_FRACTION, abs=0.005)
    assert 0.4 < large.values.numel() / large.mask.numel() < 0.6
    assert torch.equal(large.mask.sum(1), large.offsets.diff())
    assert torch.equal(work.padded(work.values)[work.mask], work.values)
    below = work.logprobs < torch.tensor(advantage.P).log()
    assert torch.equal(below.index_fill(0, work.offsets[:-1], True), work.opens)


@pytest.mark.parametrize("form", [advantage.loop_in_the_form_of_verl, advantage.loop_in_the_form_of_openrlhf])
def test_the_padded_loops_compute_gae(work: advantage.Workload, form: advantage.Program) -> None:
    found, returns = form(work.padded(work.rewards), work.padded(work.values), work.mask, 0.9)
    everywhere = torch.ones_like(work.opens)
    expected, targets = td_recursion(
        work.rewards, work.values, everywhere, work.offsets, gamma=1.0, lam=0.9, value_lam=0.9
    )
    torch.testing.assert_close(found[work.mask], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns[work.mask], targets, atol=1e-5, rtol=1e-5)


def test_every_program_runs_and_ratios_are_of_best_times(work: advantage.Workload) -> None:
    for program in advantage.programs(work).values():
        program()
    seconds = {advantage.FLOOR: [2.0, 1.0], advantage.RECURSION: [3.0, 4.0], "other": [12.0, 30.0]}
    summary = advantage.summarize("16x200", work, seconds)["programs"]
    assert summary["other"]["times_the_floor"] == 12 and summary["other"]["times_sae_rl_recursion"] == 4
    assert summary["other"]["tokens_per_s"] == work.values.numel() / 12
