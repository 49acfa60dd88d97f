"""Arms are what differs between configurations, seeds aside, and have the shortest names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from sae_rl.comparison.arms import with_arms

from .made_up import curves_of

SAE = {"algorithm.estimator.name": "sae", "algorithm.estimator.lam": 0.8, "algorithm.segmenter.boundary": "opens"}
GAE = SAE | {"algorithm.estimator.name": "gae", "algorithm.estimator.lam": 0.95}
CLOSES = SAE | {"algorithm.segmenter.boundary": "closes"}


def arms_of(*settings: Mapping[str, Any], arm_by: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    shared = {"seed": 0, "name": "x", "rollout.group_size": 4, "steps": 10}
    runs = [
        curves_of({0: 0.1, 10: 0.2}, seed=str((shared | dict(each))["seed"]), settings=shared | dict(each))
        for each in settings
    ]
    named, notes = with_arms(runs, arm_by)
    return [run.arm for run in named], notes


def seeds_of(*settings: Mapping[str, Any]) -> list[str]:
    runs = [curves_of({0: 0.1, 10: 0.2}, seed=str(each["seed"]), settings=each) for each in settings]
    return [run.seed for run in with_arms(runs)[0]]


def test_names_are_the_shortest_sets_of_overrides() -> None:
    names, notes = arms_of(SAE, GAE, CLOSES, SAE | {"seed": 1})
    assert names == [
        "estimator=sae, boundary=opens",
        "estimator=gae",
        "boundary=closes",
        "estimator=sae, boundary=opens",
    ]
    assert notes == []


def test_a_grid_of_five_factors_has_names_of_five_overrides() -> None:
    grid = [dict(zip("abcde", values, strict=True)) for values in itertools.product((1, 2), repeat=5)]
    expected = [", ".join(f"{key}={value}" for key, value in each.items()) for each in grid]
    assert arms_of(*(each | {"follows": each["a"]} for each in grid))[0] == expected


def test_an_arm_that_only_lacks_a_key() -> None:
    key = "task.train.knobs.size"
    assert arms_of({}, {key: 3}, {key: 4})[0] == ["~size", "size=3", "size=4"]


def test_lists_of_paths_are_no_templates() -> None:
    assert arms_of({"x": ["a/0", "b"]}, {"x": ["a/1", "b"], "seed": 1})[0] == ["x=['a/0', 'b']", "x=['a/1', 'b']"]


def test_one_configuration_is_one_arm() -> None:
    assert arms_of(SAE, SAE | {"seed": 1})[0] == ["all runs", "all runs"]


def test_keys_with_the_same_end_keep_more_of_it() -> None:
    policy, critic = "learner.policy.optimizer.lr", "learner.critic.optimizer.lr"
    names, _ = arms_of({policy: 1e-4, critic: 1e-3}, {policy: 2e-4, critic: 1e-3}, {policy: 1e-4, critic: 2e-3})
    assert names == [
        "policy.optimizer.lr=0.0001, critic.optimizer.lr=0.001",
        "policy.optimizer.lr=0.0002",
        "critic.optimizer.lr=0.002",
    ]


def test_values_that_yaml_writes_otherwise() -> None:
    assert arms_of({"algorithm.whitening.center": True}, {"algorithm.whitening.center": None})[0] == [
        "center=true",
        "center=null",
    ]


def test_folders_loggers_and_clusters_make_no_arms_but_a_note() -> None:
    names, notes = arms_of(
        {"output_dir": "a", "name": "one", "cluster.device": "cpu", "logger.jsonl": True, "checkpoint.keep_last": 1},
        {"output_dir": "b", "name": "two", "cluster.device": "cuda", "logger.jsonl": True, "checkpoint.keep_last": 2},
    )
    assert names == ["all runs"] * 2
    assert notes == ["Runs of one arm differ in cluster.device.", "Runs of one arm differ in checkpoint.keep_last."]


def test_a_model_for_each_seed_is_one_setting() -> None:
    runs = [
        {"seed": seed, "model.path": f"/bases/1B_{size}/base_{seed}/seed={seed}", **estimator}
        for estimator in (SAE, GAE)
        for size in ("small", "large")
        for seed in (0, 1, 12)
    ]
    names, notes = arms_of(*runs)
    assert len(notes) == 2 and (
        "Paths that differ in the seed are one setting: model.path=/bases/1B_small/base_{seed}/seed={seed}." in notes
    )
    assert len(set(names)) == 4 and all(names[i] == names[i + 1] == names[i + 2] for i in range(0, 12, 3))
    assert "estimator=sae, path=/bases/1B_small/base_{seed}/seed={seed}" in names


def test_models_whose_names_hold_a_number_like_the_seed_are_named() -> None:
    names, notes = arms_of(*({"seed": s, "model.path": f"models/Qwen3-{s}B", "output_dir": f"x/{s}"} for s in (4, 8)))
    assert names == ["all runs"] * 2
    assert notes == ["Paths that differ in the seed are one setting: model.path=models/Qwen3-{seed}B."]


def test_other_seeds_are_seeds() -> None:
    keys = "task.train.seed", "algorithm.segmenter.seed"
    assert arms_of(*({"seed": s, keys[0]: t} for s in (0, 1) for t in (5, 6)))[0] == ["all runs"] * 4
    assert seeds_of(*({"seed": s, keys[0]: t} for s in (0, 1) for t in (5, 6))) == ["0/5", "0/6", "1/5", "1/6"]
    assert seeds_of(*({"seed": s, keys[0]: s, keys[1]: 0} for s in (0, 1))) == ["0", "1"]


def test_arm_by_chooses_keys_and_sections() -> None:
    names, notes = arms_of(SAE, CLOSES, GAE, arm_by=("algorithm.estimator",))
    assert names == ["estimator=sae", "estimator=sae", "estimator=gae"]
    assert notes == ["Runs of one arm differ in algorithm.segmenter.boundary."]
    assert arms_of({"name": "one"}, {"name": "two"}, arm_by=("name",))[0] == ["name=one", "name=two"]


def test_a_key_that_no_run_has() -> None:
    with pytest.raises(ValueError, match=r"--arm-by algorithm\.estimator\.lamb: no run has that key, .*estimator\.lam"):
        arms_of(SAE, GAE, arm_by=("algorithm.estimator.lamb",))


def test_files_keep_the_arms_they_hold() -> None:
    runs = [curves_of({0: 0.1, 10: 0.2}, arm="mine", seed="3")]
    assert with_arms(runs) == (runs, [])
