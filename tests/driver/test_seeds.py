"""A seed for every response: none is drawn twice, and none depends on what else is sampled."""

from __future__ import annotations

from itertools import product

from sae_rl.seeds import derive_seed


def test_prompts_samples_seed_names_and_runs_have_seeds_of_their_own() -> None:
    seed_names = [*(f"step {k}" for k in range(10)), "evaluation", "pretraining", "probe 3"]
    asked = list(product((0, 1), seed_names, (f"level/train/0/{i}" for i in range(20)), range(4)))
    seeds = [derive_seed(*one) for one in asked]
    assert len(set(seeds)) == len(asked)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_seed_is_a_function_of_its_arguments() -> None:
    """Written down once: another value would change every run that anybody has published."""
    assert derive_seed(0, "evaluation", "p", 1) == 54511749
    assert derive_seed(0, "step 1", "1", 0) != derive_seed(0, "step 11", "", 0)
