import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sae_rl.tasks.level import Level
from sae_rl.tasks.tokenizer import build_tokenizer


def test_words_survive_the_round_trip_before_and_after_saving(tmp_path: Path) -> None:
    task = Level()
    built = build_tokenizer(task.words())
    built.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for i in range(20):
        problem = task.problem(0, "train", i)
        response = task.demonstration(problem, random.Random(i))
        for tokenizer in (built, loaded):
            prompt_ids = tokenizer(problem.prompt)["input_ids"]
            ids = tokenizer(response, add_special_tokens=False)["input_ids"]
            assert prompt_ids[0] == tokenizer.bos_token_id
            assert len(prompt_ids) == 1 + len(problem.prompt.split())
            assert len(ids) == len(response.split())
            assert tokenizer.unk_token_id not in prompt_ids + ids
            text = tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True)
            assert text == response
    assert len(loaded) == len(task.words()) + 4
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<bos>", "<eos>")


@pytest.mark.parametrize("words", [["a", "a"], ["a b"], [""], ["<eos>"]])
def test_bad_words_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="words of a tokenizer"):
        build_tokenizer(words)
