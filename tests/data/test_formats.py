"""Each layout in each format becomes the same prompts; each way a file can be broken gives one clear message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from sae_rl.data.columns import LAYOUTS
from sae_rl.data.prompts import Overlong
from sae_rl.data.sources.source import Source
from sae_rl.tasks.tokenizer import build_tokenizer

from .loading import file_source, load_prompts

TOKENIZER = build_tokenizer(["one", "two", "plus", "?", "user", "assistant", "system", "Q:", "A:"])
TOKENIZER.chat_template = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}assistant"
)
CHAT = [{"role": "user", "content": "one plus one ?"}]
VERL = {
    "data_source": "sums",
    "prompt": CHAT,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 4, "split": "train"},
}
ROWS: dict[str, dict[str, Any]] = {
    "own": {"prompt": "one plus one ?", "answer": "2", "id": "4", "task": "sums"},
    "verl": VERL,
    "dapo_math": VERL | {"extra_info": {"index": "4"}},
    "gsm8k": {"question": "one plus one ?", "answer": "one and one <<1+1=2>>\n#### 1,234", "id": "4", "task": "sums"},
}
FORMATS = ["jsonl", "parquet", "saved", "saved with splits"]


def write(folder: Path, kind: str, *rows: dict[str, Any]) -> dict[str, Any]:
    """The rows in a file or folder of that kind; the keys of a source that finds them."""
    path = folder / f"rows.{kind}" if kind in ("jsonl", "parquet") else folder / "rows"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif kind == "saved":
        Dataset.from_list(list(rows)).save_to_disk(path)
    else:
        DatasetDict({"train": Dataset.from_list(list(rows)), "test": Dataset.from_list([{"a": 1}])}).save_to_disk(path)
    return {"path": str(path)} | ({"split": "train"} if "splits" in kind else {})


def unreadable(source: Source, **arguments: Any) -> str:
    with pytest.raises(ValueError) as error:
        load_prompts(source, TOKENIZER, 10, **arguments)
    return str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_in_a_format(layout: str, kind: str, tmp_path: Path) -> None:
    source = file_source(**write(tmp_path, kind, ROWS[layout], ROWS[layout]), layout=layout, duplicates="drop")
    (prompt,) = load_prompts(source, TOKENIZER, 10)
    assert (prompt.id, prompt.task, prompt.reward) == ("4", "sums", "exact")
    assert prompt.answer == ("1234" if layout == "gsm8k" else "2")
    is_chat = layout in ("verl", "dapo_math")
    assert prompt.text == ("user one plus one ? assistant" if is_chat else "one plus one ?")


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_on_top_of_a_layout(kind: str, tmp_path: Path) -> None:
    keys = {"layout": "gsm8k", "columns": {"prompt": "text.body", "reward": "check", "answer": None}}
    row = {"text": {"body": "two ?"}, "answer": "#### 2", "check": "math"}
    (prompt,) = load_prompts(file_source(**write(tmp_path, kind, row), **keys), TOKENIZER, 10)
    assert (prompt.text, prompt.answer, prompt.reward) == ("two ?", "2", "math")


@pytest.mark.parametrize("kind", FORMATS)
def test_broken_rows_of_every_format_are_named(kind: str, tmp_path: Path) -> None:
    def known(name: str) -> None:
        if name != "exact":
            raise ValueError(f"found {name!r}, allowed: exact")

    good = {"prompt": "one", "answer": "1", "id": "a", "reward": "exact"}
    rows = [
        good,
        good,
        good | {"id": "b", "reward": "maths"},
        good | {"id": "c", "prompt": " "},
        good | {"id": "d", "answer": None},
    ]
    where = "line" if kind == "jsonl" else "row"
    lines = unreadable(file_source(**write(tmp_path, kind, *rows)), check_reward=known).splitlines()
    assert lines[0].endswith(": 4 of 5 rows are broken")
    assert lines[1:] == [
        f"  {where} 2: id 'a' was used in {where} 1 already; make ids differ, or set duplicates to 'drop'",
        f"  {where} 3: 'reward': found 'maths', allowed: exact",
        f"  {where} 4: 'prompt' is empty",
        f"  {where} 5: 'answer' must hold an answer, found null; leave the row out of the file",
    ]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_column_of_another_name_or_type(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path, kind, {"prompt": 3, "anwser": "two"})
    named = file_source(**source, columns={"answer": "anwser"})
    assert "1: 'prompt' must be text, found 3" in unreadable(named)
    as_text = {"prompt": "anwser"}
    assert "1: no column 'answer': found 'prompt', 'anwser'; columns.answer=anwser reads it" in unreadable(
        file_source(**source, columns=as_text)
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_prompts_that_are_too_long_say_where(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": "one " * n, "answer": "1", "id": f"p{n}"} for n in (3, 20, 30)]
    where = "line" if kind == "jsonl" else "row"
    wanted = f"2 of 3 prompts exceed max_prompt_tokens = 10; the longest, 'p30' in {where} 3, has 31 tokens"
    assert wanted in unreadable(file_source(**write(tmp_path, kind, *rows)))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_gsm8k_answers_without_a_result(kind: str, tmp_path: Path) -> None:
    rows = [{"question": "one ?", "answer": text} for text in ("it is 7", "#### ", "so #### 7")]
    message = unreadable(file_source(**write(tmp_path, kind, *rows), layout="gsm8k"))
    assert "2 of 3 rows" in message
    assert "1: nothing is behind '####', where GSM8K has its result: it ends in \"it is 7\"" in message


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([{"role": "user"}], '{"role": "user"'),
        ([{"role": "user", "content": None}], '"content": null'),
        ([], "found none"),
    ],
)
def test_broken_chat_messages(kind: str, messages: list[dict[str, Any]], found: str, tmp_path: Path) -> None:
    message = unreadable(file_source(**write(tmp_path, kind, {"prompt": messages, "answer": "1"})))
    assert "1: 'prompt' must be text or a list of {role, content} messages" in message and found in message


def test_messages_that_the_chat_template_refuses(tmp_path: Path) -> None:
    rows = [
        {"prompt": CHAT, "answer": "1"},
        {"prompt": [{"role": "tool", "content": "one"}], "answer": "1"},
        {"answer": "1"},
    ]
    lines = unreadable(file_source(**write(tmp_path, "jsonl", *rows))).splitlines()
    assert lines[1] == "  line 3: no column 'prompt': found 'answer'; columns.prompt=... reads another"
    assert lines[2].endswith("rows.jsonl: 1 of 2 prompts cannot be read")
    assert lines[3] == "  line 2: the tokenizer's chat template refuses the messages: no tools here"


def test_a_parquet_file_that_was_cut(tmp_path: Path) -> None:
    rows = [{"prompt": f"one {i} " * 50, "answer": str(i)} for i in range(3000)]
    file = Path(write(tmp_path, "parquet", *rows)["path"])
    whole = file.read_bytes()
    source = file_source(file)
    file.write_bytes(whole[: len(whole) // 2])  # as an interrupted copy leaves it: without its footer
    assert unreadable(source).startswith(f"{file}: cannot be read: Parquet magic bytes not found")
    file.write_bytes(whole[: len(whole) // 4] + bytes(len(whole) // 2) + whole[-(len(whole) // 4) :])  # a lost block
    assert unreadable(source).startswith(f"{file}: cannot be read")


def test_a_saved_data_set_that_was_cut(tmp_path: Path) -> None:
    source = file_source(**write(tmp_path, "saved", *({"prompt": f"one {i}", "answer": "1"} for i in range(2000))))
    (arrow,) = Path(source.path).glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:5000])
    assert source.path in unreadable(source)
    arrow.unlink()
    assert unreadable(source).startswith(f"{source.path}: ")


def test_empty_data_sets(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "empty.parquet")
    Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "empty")
    for name in ("empty.parquet", "empty"):
        assert unreadable(file_source(tmp_path / name)).endswith(": it holds no rows")


def test_splits_and_subsets_belong_to_data_sets_that_have_them(tmp_path: Path) -> None:
    splits = write(tmp_path, "saved with splits", ROWS["own"])
    assert "split = 'dev': choose one of 'train', 'test'" in unreadable(file_source(**splits | {"split": "dev"}))
    assert "split = None: choose one of 'train', 'test'" in unreadable(file_source(**splits | {"split": None}))
    (tmp_path / "b").mkdir()
    plain = write(tmp_path / "b", "saved", ROWS["own"])
    assert "split = 'train', but it holds one data set" in unreadable(file_source(**plain, split="train"))
    lines = write(tmp_path, "jsonl", ROWS["own"])
    for key in ("split", "subset"):
        assert f"{key} = 'x', but it holds one data set; set {key} to null" in unreadable(
            file_source(**lines, **{key: "x"})
        )
    (tmp_path / "no_data").mkdir()
    message = unreadable(file_source(path=str(tmp_path / "no_data")))
    assert "it is a folder, but not a whole one of datasets.save_to_disk" in message


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    message = unreadable(file_source(path="nobody/no-such-data", split="train"))
    assert message.startswith("nobody/no-such-data: there is no such file or folder, and the hub gave no data set")
    assert "with datasets.load_dataset(...).save_to_disk(FOLDER), and name that folder" in message
    assert len(message.splitlines()) == 1


def test_the_first_so_many(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "answer": str(i)} for i in range(5)]
    prompts = load_prompts(file_source(**write(tmp_path, "jsonl", *rows), num_prompts=2), TOKENIZER, 10)
    assert [prompt.answer for prompt in prompts] == ["0", "1"]


@pytest.mark.parametrize("overlong", ["error", "drop", "cut"])
def test_nobody_is_troubled_by_rows_behind_the_first_so_many(overlong: Overlong, tmp_path: Path) -> None:
    texts = ["one", "one " * 30, "two", "plus"] if overlong == "drop" else ["one", "two", "one " * 30, "plus"]
    source = file_source(
        **write(tmp_path, "jsonl", *({"prompt": text, "answer": "1"} for text in texts)), num_prompts=2
    )
    assert [prompt.text for prompt in load_prompts(source, TOKENIZER, 10, overlong)] == ["one", "two"]


def test_fewer_than_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = file_source(**write(tmp_path, "jsonl", TEXT), num_prompts=2)
    assert len(load_prompts(source, TOKENIZER, 10)) == 1
    assert caplog.messages == [f"{source.path}: num_prompts = 2, but it has 1"]


TEXT, SYSTEM = {"prompt": "one", "answer": "1"}, "two"


@pytest.mark.parametrize(
    ("keys", "prompt", "text"),
    [
        ({}, "one", "one"),
        ({"template": "Q: {prompt} A:"}, "one {0} }", "Q: one {0} } A:"),
        ({"chat": True}, "one", "user one assistant"),
        ({"chat": True, "template": "Q: {prompt}", "system_prompt": "two"}, "one", "system two user Q: one assistant"),
        ({}, CHAT, "user one plus one ? assistant"),
        ({"chat": True, "system_prompt": "two"}, CHAT, "system two user one plus one ? assistant"),
        ({"template": "Q: {prompt}"}, [*CHAT, *CHAT], "user one plus one ? user Q: one plus one ? assistant"),
    ],
)
def test_what_a_model_reads(keys: dict[str, Any], prompt: Any, text: str, tmp_path: Path) -> None:
    source = file_source(**write(tmp_path, "jsonl", {"prompt": prompt, "answer": "1"}), **keys)
    (found,) = load_prompts(source, TOKENIZER, 20)
    assert found.text == text
    begins_with_bos = found.token_ids[0] == TOKENIZER.bos_token_id
    assert begins_with_bos == (not text.endswith("assistant")), "a chat template writes its own special tokens"


def test_shapes_that_do_not_fit_a_row(tmp_path: Path) -> None:
    answered = [*CHAT, {"role": "tool", "content": "two"}]
    guided = [{"role": "system", "content": "two"}, *CHAT]
    source = write(tmp_path, "jsonl", *({"prompt": prompt, "answer": "1"} for prompt in (answered, guided)))
    message = unreadable(file_source(**source, template="Q: {prompt}", system_prompt="one", chat=True))
    assert "line 1: the template goes around a user's message, but the last is from 'tool'" in message
    assert "line 2: the messages hold a system prompt already; set system_prompt to null" in message
    with pytest.raises(ValueError, match=r"a template has \{prompt\} once"):
        file_source("rows.jsonl", template="{prompt} and {prompt}")
