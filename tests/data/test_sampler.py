import json
import random
from collections import Counter

import pytest

from sae_rl.data.sampler import Sampler
from sae_rl.types import Prompt


def prompts(count: int, answer: str = "1") -> list[Prompt]:
    return [
        Prompt(id=str(i), text=f"p{i}", token_ids=(i,), answer=answer, task="t", reward="exact") for i in range(count)
    ]


def test_each_epoch_hands_out_every_prompt_once_in_its_own_order() -> None:
    sampler = Sampler(prompts(10), seed=0)
    epochs = [[p.id for _ in range(5) for p in sampler.next(2)] for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sampler.epoch == 2


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_batches_across_epochs_drop_nothing_and_repeat_nothing(size: int) -> None:
    sampler = Sampler(prompts(10), seed=1)
    handed_out = []
    for _ in range(10):
        batch = [p.id for p in sampler.next(size)]
        assert len(set(batch)) == size  # a prompt twice in one batch would be one group of double size
        handed_out += batch
    for epoch in range(size):
        assert sorted(handed_out[10 * epoch : 10 * epoch + 10], key=int) == [str(i) for i in range(10)]


@pytest.mark.parametrize("taken", range(12))
def test_resumes_exactly_in_the_middle_of_an_epoch(taken: int) -> None:
    sampler = Sampler(prompts(10), seed=2)
    for _ in range(taken):
        sampler.next(4)
    saved = json.loads(json.dumps(sampler.state()))
    expected = [[p.id for p in sampler.next(n)] for n in (4, 3, 10, 1, 7)]
    resumed = Sampler(prompts(10), seed=2)
    resumed.load_state(saved)
    assert [[p.id for p in resumed.next(n)] for n in (4, 3, 10, 1, 7)] == expected


def test_seeds_differ_and_repeat() -> None:
    def first(seed: int) -> list[str]:
        return [p.id for p in Sampler(prompts(50), seed).next(50)]

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_errors() -> None:
    with pytest.raises(ValueError, match="found none"):
        Sampler([], seed=0)
    sampler = Sampler(prompts(3), seed=0)
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"asks for {count} prompts, allowed: 1 to 3"):
            sampler.next(count)
    with pytest.raises(ValueError, match="other prompts"):
        Sampler(prompts(3, answer="2"), seed=0).load_state(sampler.state())
    with pytest.raises(ValueError, match="has seed 0, this one 1"):
        Sampler(prompts(3), seed=1).load_state(sampler.state())


def test_what_is_put_back_comes_first_and_nothing_is_lost() -> None:
    sampler = Sampler(prompts(10), seed=3)
    first = sampler.next(4)
    sampler.put_back(first[2:])
    assert sampler.next(3)[:2] == first[2:]
    rest = sampler.next(5)
    assert len({p.id for p in [*first, *rest]}) >= 8
    assert sampler.epoch == 0


@pytest.mark.parametrize("seed", range(20))
def test_put_back_over_the_end_of_an_epoch_repeats_nothing_in_a_batch(seed: int) -> None:
    """Over many batches each prompt is used as often as any other, one time more or less, and a resumed sampler agrees."""
    draw = random.Random(seed)
    sampler, used = Sampler(prompts(7), seed=seed), Counter[str]()
    for _ in range(60):
        size = draw.randint(1, 7)
        saved = json.loads(json.dumps(sampler.state()))
        batch = sampler.next(size)
        again = Sampler(prompts(7), seed=seed)
        again.load_state(saved)
        assert again.next(size) == batch
        assert len({p.id for p in batch}) == size
        back = draw.sample(batch, draw.randint(0, size - 1))
        sampler.put_back(back)
        used.update(p.id for p in batch if p not in back)
    assert max(used.values()) - min(used.values()) <= 3, used
