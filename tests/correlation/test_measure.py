"""What is measured, and that a killed measurement goes on: scripted engines and networks, and no process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor

from sae_rl.algo.estimators import GAE, GRPO, SAE
from sae_rl.algo.segmenters import LowProbability, Random
from sae_rl.correlation.files import RESPONSES, TENSORS, load
from sae_rl.correlation.measure import Measuring, _places, measure
from sae_rl.correlation.measurements import Measurements, block_advantages, neutral_places, reference_values
from sae_rl.correlation.settings import CorrelationConfig, chosen
from sae_rl.records.rollouts import read_scored, read_step
from sae_rl.types import Rollout
from tests.correlation.made_up import made_up_batch
from tests.driver.scripted import (
    ScriptedGroups,
    ScriptedWorkers,
    make_config,
    make_prompts,
    make_rollout,
    make_run,
    reward_of,
)

LOW = {"name": "low_probability", "p": 0.5}
ESTIMATORS: dict[str, Any] = {
    "sae": {"segmenter": LOW, "estimator": {"name": "sae", "lam": 0.5}},
    "gae": {"estimator": {"name": "gae", "lam": 0.9}, "matched_to": "sae"},
    "random": {"segmenter": {"name": "random", "rate": 0.01}, "estimator": {"name": "sae"}, "matched_to": "sae"},
    "grpo": {"estimator": {"name": "grpo"}},
    "continuations": {
        "segmenter": LOW,
        "value_source": {"name": "monte_carlo", "k": 2, "budget_tokens": 60},
        "estimator": {"name": "sae", "lam": 0.5},
    },
    "none": None,
}


def settings_of(**changes: Any) -> CorrelationConfig:
    given: dict[str, Any] = {"checkpoint": None, "num_prompts": 5, "responses_per_prompt": 2, "k": 3, "every": 3}
    given |= {"boundaries": ["sae"], "gradient_dimension": 7, "estimators": ESTIMATORS}
    return CorrelationConfig.model_validate(given | changes)


def measuring_of(folder: Path, workers: ScriptedWorkers, *overrides: str, **changes: Any) -> Measuring:
    config, settings = make_config(folder, *overrides), settings_of(**changes)
    workers.version = 3
    run = make_run(config, workers, heldout=make_prompts(8))
    algorithms, lacking = chosen(settings, config)
    return Measuring(run=run, settings=settings, algorithms=algorithms, lacking=lacking, folder=folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScriptedWorkers, Measurements]:
    folder, workers = tmp_path_factory.mktemp("measured") / "straight", ScriptedWorkers()
    return folder, workers, measure(measuring_of(folder, workers))


def rollouts_by_hand() -> list[Rollout]:
    return [make_rollout(prompt, sample, 3, 1.0) for prompt in make_prompts(5) for sample in range(2)]


def test_the_responses_are_those_of_held_out_prompts(done: tuple[Path, ScriptedWorkers, Measurements]) -> None:
    folder, _, measured = done
    by_hand = rollouts_by_hand()
    assert torch.equal(measured.batch.token_ids, torch.cat([r.token_ids for r in by_hand]).int())
    assert measured.batch.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert measured.returns.tolist() == [reward_of(r) for r in by_hand]
    rollouts, rewards, reasons, scores = read_scored(folder / RESPONSES)
    assert [r.text for r in rollouts] == [r.text for r in by_hand] == [r.text for r in read_step(folder / RESPONSES)[0]]
    assert rewards == measured.returns.tolist() and all(reasons)
    assert scores.old_logprobs is not None and scores.entropies is not None and scores.ref_logprobs is None
    assert torch.equal(scores.entropies, -measured.batch.rollout_logprobs)
    assert pq.read_table(folder / RESPONSES).column("values").null_count == 0


def test_places_are_neutral_or_where_segments_open_and_their_continuations_are_independent(
    done: tuple[Path, ScriptedWorkers, Measurements],
) -> None:
    _, workers, measured = done
    neutral = set(neutral_places(measured.batch.lengths, 3).tolist())
    opened = set((measured.opens[measured.names.index("sae")] >= 0.5).nonzero().flatten().tolist())
    assert measured.places.tolist() == sorted(neutral | opened) and opened - neutral
    assert set(measured.places[measured.neutral].tolist()) == neutral
    row = 0
    for i, rollout in enumerate(rollouts_by_hand()):
        for t in range(rollout.token_ids.numel()):
            if int(measured.batch.offsets[i]) + t in neutral | opened:
                prompt = replace(rollout.prompt, response_prefix=tuple(rollout.token_ids[:t].tolist()))
                returns = [reward_of(make_rollout(prompt, sample, 3, 1.0, 8 - t)) for sample in range(3)]
                assert measured.continued[row].tolist() == returns, (i, t)
                row += 1
    assert row == len(measured.places)
    names = {asked.of["seed_name"] for asked in workers.asked("generate", "add")}
    assert names == {"correlate", "correlate reference", "correlate estimator continuations"}


def test_estimators_see_a_steps_prompts_at_a_time_and_are_matched_in_rate(
    done: tuple[Path, ScriptedWorkers, Measurements],
) -> None:
    _, workers, measured = done
    assert measured.names == ("sae", "gae", "random", "grpo", "continuations")
    scored = workers.asked("score")
    assert [asked.of["batch"].num_responses for asked in scored] == [4, 4, 2]
    opens = [LowProbability(p=0.5)(asked.of["batch"], asked.of["scores"]) for asked in scored]
    inner = sum(int(each.sum()) for each in opens) - measured.batch.num_responses
    rate = inner / (measured.batch.num_tokens - measured.batch.num_responses)
    rows: dict[str, list[Tensor]] = {name: [] for name in ("sae", "gae", "grpo", "random")}
    for asked, own in zip(scored, opens, strict=True):
        batch, scores = asked.of["batch"], asked.of["scores"]
        token_rewards = torch.zeros(batch.num_tokens).index_copy(0, batch.offsets[1:] - 1, batch.rewards)
        rows["sae"].append(SAE(lam=0.5)(batch, scores, token_rewards, own).advantages)
        rows["gae"].append(GAE(lam=0.9**rate)(batch, scores, token_rewards, own).advantages)
        rows["grpo"].append(GRPO()(batch, scores, token_rewards, own).advantages)
        drawn = Random(rate=rate)(batch, scores)
        rows["random"].append(SAE(lam=0.95)(batch, scores, token_rewards, drawn).advantages)
    for name, parts in rows.items():
        found = measured.advantages[measured.names.index(name)]
        torch.testing.assert_close(found, torch.cat(parts).double(), rtol=0, atol=1e-12)
    by_critic, by_samples = (measured.advantages[measured.names.index(name)] for name in ("sae", "continuations"))
    assert not torch.equal(by_critic, by_samples)


def test_gradients_by_prompt_are_of_every_estimator_and_of_the_reference(
    done: tuple[Path, ScriptedWorkers, Measurements],
) -> None:
    _, _, measured = done
    assert measured.gradients is not None and measured.gradients.shape == (6, 5, 7)
    blocks = block_advantages(measured, reference_values(measured))
    for e, advantages in enumerate([*measured.advantages, blocks]):
        for g in range(5):
            expected = [0.0] * 7
            for t in range(measured.batch.num_tokens):
                response = int(torch.searchsorted(measured.batch.offsets, t, right=True)) - 1
                if int(measured.batch.groups[response]) == g:
                    expected[int(measured.batch.token_ids[t]) % 7] += float(advantages[t])
            assert measured.gradients[e, g].tolist() == pytest.approx(expected, abs=1e-5)


class Killed(BaseException):
    """As a signal, no part of the program catches it."""


class Dying(ScriptedWorkers):
    """The call with number ``last`` kills the process."""

    calls = 0
    last = 0

    def _write(self, name: str, **of: Any) -> None:
        super()._write(name, **of)
        self.count()

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.last:
            raise Killed

    def open(self, **arguments: Any) -> ScriptedGroups:
        self.count()
        return super().open(**arguments)


def test_a_measurement_that_is_killed_anywhere_goes_on_and_ends_with_the_same_bytes(
    done: tuple[Path, ScriptedWorkers, Measurements], tmp_path: Path
) -> None:
    straight, _, _ = done
    counting = Dying()
    measure(measuring_of(tmp_path / "counted", counting))
    assert counting.calls > 15
    for last in range(1, counting.calls + 1):
        folder, workers = tmp_path / str(last), Dying()
        workers.last = last
        with pytest.raises(Killed):
            measure(measuring_of(folder, workers))
        assert not (folder / TENSORS).exists()
        again = Dying()
        measure(measuring_of(folder, again))
        assert again.calls <= counting.calls - last + 2, "no more than one part is done again"
        for name in (TENSORS, RESPONSES):
            assert (folder / name).read_bytes() == (straight / name).read_bytes(), last


def test_what_is_done_and_what_it_cost_is_told(tmp_path: Path) -> None:
    workers = ScriptedWorkers()
    measured = measure(measuring_of(tmp_path, workers, every=1, boundaries=[]))
    notes = [asked.of["text"] for asked in workers.asked("note")]
    lengths = measured.batch.lengths
    told = 3 * int((lengths * (lengths + 1) // 2).sum())
    assert measured.neutral.all() and len(measured.places) == measured.batch.num_tokens
    (cost,) = [note for note in notes if note.startswith("continuations of")]
    assert cost.startswith(f"continuations of {measured.batch.num_tokens:,} places x 3 and the values of continuations")
    least = int(cost.partition("about ")[2].partition(" tokens")[0].replace(",", ""))
    assert told < least <= told + 3 * 60, "the budget of each step's continuations is the most that they cost"

    unlimited = ESTIMATORS["continuations"] | {"value_source": {"name": "monte_carlo", "k": 2, "budget_tokens": None}}
    measure(
        measuring_of(
            tmp_path / "unlimited", workers, every=1, estimators={"grpo": ESTIMATORS["grpo"], "sae": unlimited}
        )
    )
    (cost,) = [asked.of["text"] for asked in workers.asked("note") if "the values of sae" in asked.of["text"]]
    left = torch.cat([torch.arange(n, 0, -1) for n in lengths.tolist()]).index_fill(0, measured.batch.offsets[:-1], 0)
    own = 2 * int(left[measured.opens[measured.names.index("sae")] > 0].sum())
    assert f"about {told + own:,} tokens" in cost, "first tokens are not measured for values"
    for stage, parts in (("responses", "3 steps"), ("continuations", "5 prompts"), ("gradients", "5 prompts")):
        number = parts.split()[0]
        assert any(note.startswith(f"{stage}: {number} of {parts}") for note in notes), (stage, notes)
    assert load(tmp_path).names == measured.names


def test_without_a_critic_the_estimators_that_need_one_are_left_out(tmp_path: Path) -> None:
    measuring = measuring_of(tmp_path, ScriptedWorkers(), "algorithm=grpo")
    assert measuring.lacking == ["sae", "gae", "random", "continuations"]
    measured = measure(measuring)
    assert measured.names == ("grpo",) and len(measured.places) > int(measured.neutral.sum())


def test_responses_whose_check_failed_are_left_out(tmp_path: Path) -> None:
    measuring = measuring_of(tmp_path, ScriptedWorkers(), "rollout.group_size=6")
    heldout = make_prompts(8, verifier="moody")
    measured = measure(replace(measuring, run=replace(measuring.run, heldout=heldout)))
    assert measured.batch.num_responses < 30
    assert measured.batch.groups.bincount().min() >= 2, "an estimator compares the responses of a group"
    assert measured.continued.isnan().any() and measured.gradients is not None
    assert measured.gradients.isfinite().all()


def test_contradictions_are_told_with_their_key(tmp_path: Path) -> None:
    config = make_config(tmp_path)

    def problems(**changes: Any) -> str:
        with pytest.raises(ValueError) as error:
            chosen(settings_of(**changes), config)
        return str(error.value)

    assert "correlation.boundaries = say: no estimator has this name, did you mean 'sae'?" in problems(
        boundaries=["say"]
    )
    wrong = {"a": {"segmenter": LOW, "estimator": {"name": "sae"}, "matched_to": "b"}}
    said = problems(estimators=ESTIMATORS | wrong)
    assert "correlation.estimators.a.matched_to: LowProbability takes no rate; allowed: random" in said
    assert "correlation.estimators.a.matched_to = b: no estimator has this name" in said
    three = {"c": {"value_source": {"name": "ensemble", "num_critics": 3}, "estimator": {"name": "sae"}}}
    assert "correlation.estimators.c compares 3 critics, but this run has 1" in problems(estimators=ESTIMATORS | three)
    chained = {"e": ESTIMATORS["gae"] | {"matched_to": "random"}, "f": ESTIMATORS["gae"] | {"matched_to": "f"}}
    said = problems(estimators=ESTIMATORS | chained)
    for name, other in (("e", "random"), ("f", "f")):
        assert f"correlation.estimators.{name}.matched_to = {other}, which is matched itself" in said
    discounted = {"g": {"estimator": {"name": "gae", "gamma": 0.9}}}
    assert "correlation.estimators.g.estimator.gamma = 0.9: " in problems(estimators=ESTIMATORS | discounted)
    alone = make_config(tmp_path, "rollout.group_size=1")
    with pytest.raises(ValueError, match=r"estimators\.grpo: correlation\.responses_per_prompt is 1"):
        chosen(settings_of(), alone)
    useless = {"d": {"value_source": {"name": "group_mean"}, "estimator": {"name": "grpo"}}}
    assert "correlation.estimators.d: algorithm.value_source = group_mean: GRPO reads no values" in problems(
        estimators=ESTIMATORS | useless
    )


def test_an_estimator_that_was_left_out_is_not_matched(tmp_path: Path) -> None:
    measuring = measuring_of(tmp_path, ScriptedWorkers())
    measuring.algorithms.pop("random")
    assert "random" not in measure(measuring).names


def test_values_have_other_continuations_than_the_reference_whatever_the_name(tmp_path: Path) -> None:
    workers, value = ScriptedWorkers(), ESTIMATORS["continuations"]
    measure(measuring_of(tmp_path, workers, estimators={"sae": ESTIMATORS["sae"], "reference": value}))
    names = {asked.of["seed_name"] for asked in workers.asked("generate", "add")}
    assert names == {"correlate", "correlate reference", "correlate estimator reference"}


class Opening(ScriptedWorkers):
    """Counts the calls that sample."""

    opened = 0

    def open(self, **arguments: Any) -> ScriptedGroups:
        self.opened += 1
        return super().open(**arguments)


def test_continuations_in_pieces_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, in_pieces = Opening(), Opening()
    whole = measure(measuring_of(tmp_path / "straight", straight))
    monkeypatch.setattr("sae_rl.correlation.measure.HELD", 7)  # two places of three continuations each
    assert torch.equal(measure(measuring_of(tmp_path / "pieces", in_pieces)).continued, whole.continued)
    num_places = whole.batch.groups[torch.searchsorted(whole.batch.offsets, whole.places, right=True) - 1].bincount()
    assert in_pieces.opened - straight.opened == int(((num_places + 1) // 2 - 1).sum()) > 0
    costs = [(tmp_path / name / "parts" / "cost.json").read_text() for name in ("straight", "pieces")]
    tokens = [json.loads(cost)["continuations"]["tokens"] for cost in costs]
    assert tokens[0] == tokens[1]


def test_soft_segments_open_where_references_take_them_to() -> None:
    batch = made_up_batch()
    opens = torch.linspace(0, 1, batch.num_tokens)
    places = _places(settings_of(every=1000), batch, {"sae": opens})
    neutral = neutral_places(batch.lengths, 1000).tolist()
    assert places.tolist() == sorted({*neutral, *(opens >= 0.5).nonzero().flatten().tolist()})
