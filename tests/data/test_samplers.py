"""Mixtures and curricula: proportions, promotion, and that a resumed run draws what the straight one does."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_rl.data.curriculum import CurriculumSampler
from sae_rl.data.mixture import MixtureSampler
from sae_rl.data.sampler import PromptSampler, Sampler
from sae_rl.types import Prompt

Make = Callable[[], PromptSampler]


def prompts(count: int, part: str = "t") -> list[Prompt]:
    return [
        Prompt(id=f"{part}/{i}", text=f"p{i}", token_ids=(i,), answer="1", task=part, reward="exact")
        for i in range(count)
    ]


def curriculum(
    part: str = "t", seed: int = 1, window: int = 4, sizes: tuple[int, ...] = (7, 6, 9)
) -> CurriculumSampler:
    levels = {
        3 * level: [
            Prompt(id=f"{part}/level_{level}/{i}", text="p", token_ids=(i,), answer="1", task=part, reward="exact")
            for i in range(size)
        ]
        for level, size in enumerate(sizes)
    }
    return CurriculumSampler(levels, seed, promote_at=0.5, window_prompts=window)


def mixture(weights: dict[str, float] | None = None, size: int = 9) -> MixtureSampler:
    weights = weights or {"a": 0.5, "b": 0.2, "c": 0.3}
    parts: dict[str, PromptSampler] = {name: Sampler(prompts(size + i, name), seed=i) for i, name in enumerate(weights)}
    return MixtureSampler(parts, weights)


def mixture_with_a_curriculum() -> MixtureSampler:
    parts: dict[str, PromptSampler] = {"a": Sampler(prompts(8, "a"), 0), "c": curriculum("c")}
    return MixtureSampler(parts, {"a": 2, "c": 1})


KINDS: dict[str, Make] = {
    "shuffle": lambda: Sampler(prompts(7), seed=3),
    "curriculum": curriculum,
    "mixture": mixture,
    "mixture with a curriculum": mixture_with_a_curriculum,
}


def walk(sampler: PromptSampler, steps: list[int], seed: int) -> list[list[str]]:
    """A run in small: batches are drawn, some prompts put back, the others scored, as a function of what they are."""
    drawn = []
    for size in steps:
        batch = sampler.next(min(size, len(sampler.prompts)))
        drawn.append([prompt.id for prompt in batch])
        draw = random.Random(f"{seed}/{drawn[-1]}")
        back = draw.sample(batch, draw.randint(0, len(batch) - 1))
        sampler.put_back(back)
        used = [prompt for prompt in batch if prompt not in back]
        sampler.observe(used, [draw.random() for _ in used])
    return drawn


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@settings(deadline=None, max_examples=40)
@given(steps=st.lists(st.integers(1, 6), min_size=1, max_size=14), seed=st.integers(0, 99))
def test_stopping_and_resuming_anywhere_changes_nothing(make: Make, steps: list[int], seed: int) -> None:
    straight = walk(make(), steps, seed)
    for stop in range(len(steps) + 1):
        first, second = make(), make()
        before = walk(first, steps[:stop], seed)
        second.load_state(json.loads(json.dumps(first.state())))
        assert before + walk(second, steps[stop:], seed) == straight


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_is_under_way_when_a_run_stops_comes_first_when_it_resumes(make: Make) -> None:
    first, second = make(), make()
    first.next(3)
    unused = first.next(3)
    second.load_state(json.loads(json.dumps(first.state(unused))))
    first.put_back(unused)
    assert second.state() == first.state()
    assert second.next(3) == first.next(3)
    assert {prompt.id for prompt in unused} <= {prompt.id for prompt in [*second.next(2), *unused]}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_an_order_of_its_own(make: Make) -> None:
    sampler = make()
    taken = sampler.next(5)
    anew, again, other = sampler.anew(5), sampler.anew(5), sampler.anew(6)
    assert len(anew.prompts) == len(make().prompts)
    assert [p.id for p in anew.next(6)] == [p.id for p in again.next(6)]
    assert anew.state() != other.state()
    fresh = make()
    assert fresh.next(5) == taken, "a new one takes nothing from the old"


def test_states_belong_to_their_samplers() -> None:
    states = {name: make().state() for name, make in KINDS.items()}
    for (name, make), (other, state) in itertools.product(KINDS.items(), states.items()):
        if name != other and {name, other} != {"mixture", "mixture with a curriculum"}:
            with pytest.raises(ValueError, match=r"the saved sampler is a \w+, this one a \w+"):
                make().load_state(state)
    with pytest.raises(ValueError, match=r"the saved mixture has the weights .*; resume with the same"):
        mixture({"a": 1, "b": 1, "c": 1}).load_state(states["mixture"])
    with pytest.raises(ValueError, match="part 'a': the saved sampler had other prompts"):
        mixture(size=5).load_state(states["mixture"])
    with pytest.raises(ValueError, match="the saved sampler has 3 levels and is at 0"):
        curriculum(sizes=(7, 6)).load_state(states["curriculum"])


@settings(deadline=None)  # the time is the machine's
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=5),
    sizes=st.lists(st.integers(1, 12), min_size=5, max_size=60),
)
def test_every_part_gets_its_share_to_the_prompt(weights: list[float], sizes: list[int]) -> None:
    named = {str(i): weight for i, weight in enumerate(weights)}
    sampler = mixture(named, size=200)
    counts, total = Counter[str](), 0
    for size in sizes:
        batch = sampler.next(size)
        assert len({prompt.id for prompt in batch}) == size
        counts.update(prompt.task for prompt in batch)
        total += size
        for name, weight in named.items():
            assert abs(counts[name] - total * weight / sum(weights)) < len(weights), (counts, named)


def test_shares_over_many_steps_are_exact() -> None:
    sampler = mixture({"a": 0.5, "b": 0.2, "c": 0.3})
    counts = Counter(prompt.task for _ in range(250) for prompt in sampler.next(4))
    assert counts == {"a": 500, "b": 200, "c": 300}


def test_what_is_put_back_does_not_count() -> None:
    sampler, used = mixture({"a": 0.5, "b": 0.5}), Counter[str]()
    for _ in range(100):
        batch = sampler.next(4)
        back = [prompt for prompt in batch if prompt.task == "b"][:1]  # groups of b are often of no use
        sampler.put_back(back)
        used.update(prompt.task for prompt in batch if prompt not in back)
    assert abs(used["a"] - used["b"]) <= 2, used


def test_each_part_has_its_own_epochs() -> None:
    sampler = MixtureSampler({"a": Sampler(prompts(4, "a"), 0), "b": Sampler(prompts(40, "b"), 0)}, {"a": 1, "b": 1})
    drawn = [prompt for _ in range(20) for prompt in sampler.next(4)]
    counts = Counter(prompt.id for prompt in drawn)
    assert {counts[f"a/{i}"] for i in range(4)} == {10} and {counts[f"b/{i}"] for i in range(40)} == {1}
    assert sampler.epoch == 0


def test_a_part_that_is_used_up_by_a_batch_catches_up_later() -> None:
    sampler = MixtureSampler({"a": Sampler(prompts(2, "a"), 0), "b": Sampler(prompts(20, "b"), 0)}, {"a": 1, "b": 1})
    assert Counter(prompt.task for prompt in sampler.next(10)) == {"a": 2, "b": 8}
    assert Counter(prompt.task for prompt in sampler.next(2)) == {"a": 2}
    with pytest.raises(ValueError, match="asks for 23 prompts, allowed: 1 to 22, the size of all parts"):
        sampler.next(23)


def test_a_mixture_needs_parts_with_weights() -> None:
    for weights in ({}, {"a": 0.0}, {"b": 1.0}):
        with pytest.raises(AssertionError, match="each part has a weight above 0"):
            MixtureSampler({"a": Sampler(prompts(2, "a"), 0)}, weights)


def level_of(prompt: Prompt) -> int:
    return int(prompt.id.split("_")[1].split("/")[0])


def test_a_curriculum_moves_on_when_the_window_is_full_and_good_enough() -> None:
    sampler = curriculum(window=4)  # promote at a mean of 0.5
    batch = sampler.next(3)
    sampler.observe(batch, [1.0, 1.0, 1.0])
    assert sampler.level == 0, "three scores are no window of four"
    sampler.observe(batch[:1], [0.0])
    assert sampler.level == 3
    hard = sampler.next(4)
    assert {level_of(prompt) for prompt in hard} == {1}
    sampler.observe(batch, [1.0, 1.0, 1.0])  # of the level before: they say nothing of this one
    sampler.observe(hard, [1.0, 0.0, 0.0, 0.0])
    sampler.observe(hard[:3], [0.0, 1.0, 0.0])
    assert sampler.level == 3, "the first one left the window"
    sampler.observe(hard[:2], [1.0, 0.0])
    assert sampler.level == 6
    hardest = sampler.next(5)
    sampler.observe(hardest, [1.0] * 5)
    assert sampler.level == 6, "there is no other"
    assert {level_of(prompt) for prompt in sampler.next(4)} == {2}


def test_prompts_of_the_level_before_that_were_put_back_still_come_first() -> None:
    sampler = curriculum(window=2)
    easy = sampler.next(4)
    sampler.put_back(easy[2:])
    sampler.observe(easy[:2], [1.0, 1.0])
    batch = sampler.next(5)
    assert batch[:2] == easy[2:] and {level_of(prompt) for prompt in batch[2:]} == {1}


def test_a_mixture_tells_its_parts_their_own_scores() -> None:
    sampler = mixture_with_a_curriculum()
    for _ in range(3):
        batch = sampler.next(6)
        sampler.observe(batch, [float(prompt.task == "c") for prompt in batch])
    assert sampler.state()["levels"] == [3]
    with pytest.raises(ValueError, match="allowed: 1 to"):
        curriculum().next(8)
    with pytest.raises(AssertionError):
        CurriculumSampler({}, 0, promote_at=0.5, window_prompts=1)
