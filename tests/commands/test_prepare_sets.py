"""``sae-rl prepare-sets`` on made-up rows with the columns of published files, and ``task=math_sets`` on what it writes."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from sae_rl.commands.prompts import load_task
from sae_rl.config.compose import load_config
from sae_rl.config.search_path import CONF
from sae_rl.rewards.math.verifier import Math
from sae_rl.rewards.verdict import Sample
from sae_rl.settings import ConfigError
from sae_rl.tasks.tokenizer import build_tokenizer

from ..conftest import CommandLine

SETS = yaml.safe_load((CONF / "prepare_sets.yaml").read_text())["sets"]
BEFORE, AFTER = SETS["dapo_math_17k"]["before"], SETS["dapo_math_17k"]["after"]


def dapo(problem: str, answer: str, index: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{BEFORE}{problem}{AFTER}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


ROWS: dict[str, list[dict[str, Any]]] = {
    "dapo_math_17k": [dapo("What is 2 + 3?", "5", "a"), dapo("What is $2 - 36$?", "-34", "b")] * 100
    + [dapo("What is 2 + 3?", "6", "c")] * 100,  # the prompt of a, under another id
    "aime24": [
        {
            "id": 60,
            "problem": "What is 20 + 5?",
            "solution": r"\boxed{025}",
            "answer": "025",
            "url": "u",
            "year": "2024",
        }
    ],
    "aime25": [{"problem": "What is 60 + 10?", "answer": "70", "id": "0"}],
    "amc23": [{"id": 0, "answer": 27.0, "question": "What is 20 + 7?", "url": "u"}],
    "beyond_aime": [{"problem": "What is 33124146 + 1?", "answer": 33124147}],
}


@pytest.fixture
def published(tmp_path: Path) -> dict[str, list[str]]:
    """The overrides that read made-up rows instead of what is published."""
    overrides = {}
    for name, rows in ROWS.items():
        file = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        size = {"dapo_math_17k": 2}.get(name, len(rows))
        overrides[name] = [f"sets.{name}.{key}" for key in (f"path={file}", "split=null", f"num_problems={size}")]
    return overrides


def written(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_published_numbers_of_problems() -> None:
    sizes = {name: source["num_problems"] for name, source in SETS.items()}
    assert sizes == {"dapo_math_17k": 17_398, "aime24": 30, "aime25": 30, "amc23": 40, "beyond_aime": 100}


def test_each_set_becomes_a_file(sae_rl: CommandLine, published: dict[str, list[str]], tmp_path: Path) -> None:
    outcome = sae_rl("prepare-sets", *chain.from_iterable(published.values()))
    assert outcome.code == 0, outcome.stderr
    lines = [f"data/math/{name}.jsonl: 1 problem" for name in ROWS]
    assert outcome.stdout.splitlines() == ["data/math/dapo_math_17k.jsonl: 2 problems", *lines[1:]]
    folder = tmp_path / "data" / "math"
    assert written(folder / "dapo_math_17k.jsonl") == [  # copies are gone, and the first answer of a prompt stays
        {"prompt": "What is 2 + 3?", "answer": "5", "id": "a", "task": "math_dapo"},
        {"prompt": "What is $2 - 36$?", "answer": "-34", "id": "b", "task": "math_dapo"},
    ]
    assert written(folder / "beyond_aime.jsonl") == [
        {"prompt": "What is 33124146 + 1?", "answer": "33124147", "id": "row 1"}
    ]
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.jsonl" for name in ROWS)
    for name, said in (("aime24", "25"), ("aime25", "70"), ("amc23", "27"), ("beyond_aime", "33,124,147")):
        (row,) = written(folder / f"{name}.jsonl")
        response = f"It is a sum.\nAnswer: {said}"
        assert Math()(Sample(prompt=row["prompt"], response=response, answer=row["answer"])).score == 1, name


def test_a_run_reads_what_it_wrote(sae_rl: CommandLine, published: dict[str, list[str]], tiny_model: Path) -> None:
    assert sae_rl("prepare-sets", "output_dir=sets", *chain.from_iterable(published.values())).code == 0
    tokenizer = build_tokenizer(["one"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    small = ["rollout.prompts_per_step=2", "rollout.max_response_tokens=64", "learner.critic_pretraining.num_prompts=0"]
    small += [f"model.path={tiny_model}", "task=math_sets", "task.max_prompt_tokens=400", "task.folder=sets"]
    config = load_config([*small, "evaluation.every_steps=1"])
    sampler, heldout = load_task(config, lambda: tokenizer)
    assert (
        [prompt.text for prompt in sampler.prompts]
        == [  # as published, to the letter
            f"user: {row['prompt'][0]['content']}" for row in ROWS["dapo_math_17k"][:2]
        ]
    )
    assert [(prompt.task, prompt.id, prompt.answer) for prompt in heldout] == [
        ("aime24", "aime24/60", "025"),
        ("aime25", "aime25/0", "70"),
        ("amc23", "amc23/0", "27.0"),
        ("beyond_aime", "beyond_aime/row 1", "33124147"),
    ]
    assert heldout[0].text == f"user: {BEFORE}What is 20 + 5?{AFTER}"
    parts = ["task.evaluation.parts.amc23=null", "task.evaluation.parts.aime24.samples_per_prompt=32"]
    fewer = load_config([*small, "evaluation.every_steps=1", *parts])
    assert [prompt.task for prompt in load_task(fewer, lambda: tokenizer)[1]] == ["aime24", "aime25", "beyond_aime"]
    assert fewer.task.evaluation is not None and fewer.task.evaluation.samples_per_part() == {"aime24": 32}
    with pytest.raises(ConfigError) as error:
        load_task(load_config([*small, "task.folder=none"]), lambda: tokenizer)
    assert str(error.value).splitlines() == [
        "task.train: none/dapo_math_17k.jsonl: there is no such file",
        "task.folder = none: there is no such folder; `sae-rl prepare-sets output_dir=none` makes it",
    ]


WRONG = {
    "number": (["sets.aime24.num_problems=30"], ["sets.aime24: num_problems = 30, but", "aime24.parquet has 1;"]),
    "column": (["sets.amc23.columns.prompt=problem"], ["sets.amc23: ", "no column 'problem': found 'id', 'answer'"]),
    "file": (["sets.aime25.path=none.jsonl"], ["sets.aime25: none.jsonl: there is no such file"]),
    "split": (["sets.aime24.split=train"], ["sets.aime24: ", "split = 'train', but it holds one data set"]),
    "answer": (["sets.aime24.columns.answer=url", "sets.aime24.reward=numeric"], ["cannot read 1 of 1 answers"]),
    "reward": (["sets.aime24.reward=maths"], ["sets.aime24: ", "did you mean 'math'?"]),
    "copies": (["sets.dapo_math_17k.duplicates=error"], ["sets.dapo_math_17k: ", "was used in row 1 already"]),
    "key": (["sets.aime24.nums=3"], ["sets.aime24 has no 'nums'"]),
    "set": (["sets.aime=3"], ["sets.aime"]),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named(mistake: str, sae_rl: CommandLine, published: dict[str, list[str]], tmp_path: Path) -> None:
    overrides, fragments = WRONG[mistake]
    outcome = sae_rl("prepare-sets", *chain.from_iterable(published.values()), *overrides)
    assert outcome.code == 2 and "Traceback" not in outcome.stderr
    for fragment in fragments:
        assert fragment in outcome.stderr
    if mistake not in ("key", "set"):  # sets with nothing wrong are written
        assert (tmp_path / "data" / "math" / "beyond_aime.jsonl").exists()


def test_a_problem_without_the_instruction_is_counted(
    sae_rl: CommandLine, published: dict[str, list[str]], tmp_path: Path
) -> None:
    left_out = [f"sets.{name}=null" for name in ROWS if name != "dapo_math_17k"]
    outcome = sae_rl("prepare-sets", *published["dapo_math_17k"], *left_out, "sets.dapo_math_17k.before='Solve it: '")
    assert "  2 of them came without the instruction" not in outcome.stdout, "what stands behind the problem was there"
    more = ["sets.dapo_math_17k.after=''"]
    outcome = sae_rl(
        "prepare-sets", *published["dapo_math_17k"], *left_out, "sets.dapo_math_17k.before='Solve it: '", *more
    )
    assert "  2 of them came without the instruction" in outcome.stdout, outcome.stderr


def test_a_set_can_be_left_out_and_another_added(
    sae_rl: CommandLine, published: dict[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    left_out = [f"sets.{name}=null" for name in ROWS if name != "aime24"]
    outcome = sae_rl(
        "prepare-sets", *published["aime24"], *left_out, "sets.mine={path: mine.jsonl, num_problems: 1}", "output_dir=d"
    )
    assert outcome.code == 0, outcome.stderr
    assert sorted(file.name for file in (tmp_path / "d").iterdir()) == ["aime24.jsonl", "mine.jsonl"]


def test_rows_of_an_own_set_keep_their_reward_and_task_and_only_the_first_are_written(
    sae_rl: CommandLine, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "1 + 1?", "answer": "2"},
        {"prompt": "2 + 2?", "answer": "4", "reward": "numeric", "task": "sums"},
        {"prompt": "Which is red?", "answer": "B", "reward": "choice", "task": "colours"},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    left_out = [f"sets.{name}=null" for name in ROWS]
    own = "sets.mine={path: mine.jsonl, num_problems: 3}"
    assert sae_rl("prepare-sets", *left_out, own, "output_dir=all").code == 0
    assert written(tmp_path / "all" / "mine.jsonl") == [
        {**row, "id": f"line {number}"} for number, row in enumerate(rows, start=1)
    ]
    outcome = sae_rl("prepare-sets", *left_out, own, "sets.mine.num_prompts=2", "output_dir=two")
    assert outcome.stdout == "two/mine.jsonl: 2 problems\n"
    assert written(tmp_path / "two" / "mine.jsonl") == written(tmp_path / "all" / "mine.jsonl")[:2]
