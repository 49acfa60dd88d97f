"""Prompts from tasks and files, and what is said about broken ones."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from sae_rl.data.sources.file import FileSource
from sae_rl.rewards.table import READY
from sae_rl.settings import ConfigError
from sae_rl.tasks.level import Level
from sae_rl.tasks.table import TASKS, make_task
from sae_rl.tasks.task import Task
from sae_rl.tasks.tokenizer import build_tokenizer

from .loading import file_source, load_prompts, procedural

TOKENIZER = build_tokenizer(["one", "two", "plus", "?", "user", "assistant"])
CHAT = [{"role": "user", "content": "one plus one ?"}]


def write(folder: Path, *rows: dict | bytes) -> FileSource:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return file_source(path)


def test_rows_become_prompts(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        {"prompt": "one plus one ?", "answer": "two", "id": "a", "reward": "math", "task": "other", "more": 1},
        b"",
        {"prompt": "two ?", "answer": {"need": 2}},
        {"prompt": "one ?", "answer": 3, "id": 7},
    )
    a, b, c = load_prompts(source, TOKENIZER, 10)
    assert (a.id, a.text, a.answer, a.reward, a.task) == ("a", "one plus one ?", "two", "math", "other")
    assert list(a.token_ids) == [1, 4, 6, 4, 7]
    assert (b.id, b.answer, b.reward, b.task) == ("line 3", '{"need": 2}', "exact", "rows")
    assert (c.id, c.answer) == ("7", "3")


def test_all_broken_rows_are_named_at_once(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        {"prompt": "one", "answer": "two", "id": "a"},
        b'{"prompt": "one", ',
        {"prompt": "one", "anwser": "two"},
        b'{"prompt": "\xff", "answer": "two"}',
        {"prompt": "one", "answer": "two", "id": "a"},
        b"[1, 2]",
        {"prompt": 3, "answer": "two"},
        {"prompt": "  ", "answer": "two"},
        {"prompt": "one", "answer": None},
        {"prompt": [{"role": "user"}], "answer": "two"},
        {"prompt": "one", "answer": "two", "reward": ["math"]},
        {"prompt": "one", "answer": "two", "id": "b"},
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl: 10 of 12 rows are broken") as error:
        load_prompts(source, TOKENIZER, 10)
    expected = [
        "line 2: not JSON",
        "line 3: no column 'answer': found 'prompt', 'anwser'; columns.answer=anwser reads it",
        "line 4: not UTF-8: byte 13 of the line is 0xff",
        "line 5: id 'a' was used in line 1 already",
        "line 6: must be an object, found [1, 2]",
        "line 7: 'prompt' must be text, found 3",
        "line 8: 'prompt' is empty",
        "line 9: 'answer' must hold an answer, found null",
        'line 10: \'prompt\' must be text or a list of {role, content} messages, found {"role": "user"}',
        "line 11: 'reward' must be text or a whole number, found [\"math\"]",
    ]
    found = str(error.value).splitlines()[1:]
    assert len(found) == len(expected)
    for line, beginning in zip(found, expected, strict=True):
        assert line.strip().startswith(beginning)


def test_a_file_that_is_broken_throughout_gives_a_short_message(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="200 of 200 rows") as error:
        load_prompts(write(tmp_path, *[b"x"] * 200), TOKENIZER, 10)
    assert len(str(error.value).splitlines()) == 52
    assert "... and 150 more" in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "bad.parquet").write_text("not parquet")
    (tmp_path / "rows.tsv").write_text("prompt,answer")
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in {
        "empty.jsonl": "holds no rows",
        "bad.parquet": "not a parquet file",
        "rows.tsv": r"'\.tsv', allowed: \.jsonl, \.json, \.csv, \.parquet",
        "missing.jsonl": "no such file",
        "folder.jsonl": "it is a folder, but not a whole one of datasets.save_to_disk",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            load_prompts(file_source(tmp_path / name), TOKENIZER, 10)
        assert name in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_dapo_style_rows(tmp_path: Path, kind: str) -> None:
    TOKENIZER.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": CHAT,
            "reward_model": {"ground_truth": "34", "style": "rule"},
            "extra_info": {"index": index},
        }
        for index in ("x1", "x2", "x1")
    ]
    write(tmp_path, *rows)
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    keys = {"path": tmp_path / f"rows.{kind}", "reward": "math", "layout": "dapo_math"}
    prompts = load_prompts(file_source(**keys, duplicates="drop"), TOKENIZER, 10)
    assert [p.id for p in prompts] == ["x1", "x2"]
    assert (prompts[0].answer, prompts[0].task, prompts[0].reward) == ("34", "math_dapo", "math")
    assert prompts[0].text == "user one plus one ? assistant"
    assert list(prompts[0].token_ids) == [8, 4, 6, 4, 7, 9]  # no BOS: a template writes its own
    with pytest.raises(ValueError, match=r"id 'x1' was used in (line|row) 1 already"):
        load_prompts(file_source(**keys), TOKENIZER, 10)
    wrong = {"answer": "reward_model.truth"}
    with pytest.raises(ValueError, match=r"no column 'reward_model.truth': found 'ground_truth', 'style'"):
        load_prompts(file_source(**keys, columns=wrong), TOKENIZER, 10)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        load_prompts(write(tmp_path, {"prompt": CHAT, "answer": "two"}), build_tokenizer(["one"]), 10)


def test_overlong_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path, {"prompt": "one", "answer": "1"}, {"prompt": "one plus one", "answer": "2"})
    with pytest.raises(ValueError, match=r"1 of 2 prompts exceed max_prompt_tokens = 3; the longest, 'line 2', has 4"):
        load_prompts(source, TOKENIZER, 3)
    assert [p.text for p in load_prompts(source, TOKENIZER, 3, "drop")] == ["one"]
    assert "1 of 2 prompts" in caplog.text
    with pytest.raises(ValueError, match="leaves nothing"):
        load_prompts(source, TOKENIZER, 1, "drop")


def test_an_overlong_prompt_is_cut_to_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path, {"prompt": "one", "answer": "1"}, {"prompt": "two plus one ?", "answer": "2"})
    short, cut = load_prompts(source, TOKENIZER, 3, "cut")
    assert (short.text, list(short.token_ids)) == ("one", [1, 4])
    assert (cut.text, list(cut.token_ids)) == ("plus one ?", [6, 4, 7])  # BOS is cut off too
    assert "1 of 2 prompts" in caplog.text and "cut to their end" in caplog.text


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_every_task_keeps_the_contract(make: type[Task]) -> None:
    task = make()
    assert TASKS[task.name] is make
    assert task.name in READY
    tokenizer = build_tokenizer(task.words())
    prompts = load_prompts(procedural(task.name, num_prompts=50), tokenizer, 100)
    assert len({prompt.id for prompt in prompts}) == 50
    assert load_prompts(procedural(task.name, num_prompts=10), tokenizer, 100) == prompts[:10]
    assert not {p.text for p in prompts} & {
        p.text for p in load_prompts(procedural(task.name, num_prompts=50, split="held_out"), tokenizer, 100)
    }
    for prompt in prompts:
        assert tokenizer.unk_token_id not in prompt.token_ids
        assert tokenizer.decode(prompt.token_ids, skip_special_tokens=True) == prompt.text


def test_problems_are_checked() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        procedural(num_prompts=0)


def test_a_source_holds_each_problem_once() -> None:
    knobs = {"num_steps": 1, "need": 1, "min_drift": 1, "max_drift": 3}
    tokenizer = build_tokenizer(Level(**knobs).words())
    drawn = load_prompts(procedural(num_prompts=4, knobs=knobs), tokenizer, 100)
    assert len({prompt.text for prompt in drawn}) == 4
    with pytest.raises(
        ConfigError,
        match=r"^task.train.num_prompts = 400: with these knobs level has \d different problems in split train",
    ):
        load_prompts(procedural(num_prompts=400, knobs=knobs), tokenizer, 100)


def test_a_split_that_no_problem_belongs_to_is_said() -> None:
    knobs = {"num_steps": 1, "need": 1, "min_drift": 2, "max_drift": 2}
    source = procedural(num_prompts=1, knobs=knobs, split="held_out")
    with pytest.raises(ConfigError, match=r"^task.train.knobs: 10000 draws in a row gave no problem of split held_out"):
        load_prompts(source, build_tokenizer(Level(**knobs).words()), 100)


def test_knobs_are_checked_for_their_types() -> None:
    assert make_task("level", {"actions": [-1, 1]}) == Level(actions=(-1, 1))
    with pytest.raises(ValueError, match=r"num_steps: found 2.5: input should be a valid integer"):
        make_task("level", {"num_steps": 2.5, "need": 1})
