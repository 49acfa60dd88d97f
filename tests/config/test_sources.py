"""What a source's configuration says reaches the reader of its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sae_rl.compose import load_config
from sae_rl.config import SourceConfig, TaskConfig
from sae_rl.errors import ConfigError
from sae_rl.run import load_source, load_tokenizer


def test_duplicates_are_dropped_only_where_the_source_says_so(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "twice.jsonl"
    file.write_text((json.dumps({"prompt": "I0 D+3", "answer": "1", "id": "a"}) + "\n") * 2)
    tokenizer, rewards = load_tokenizer(str(tiny_model)), load_config([f"model.path={tiny_model}"]).rewards
    for duplicates in ("error", "drop"):
        source = SourceConfig(name="file", path=str(file), reward="exact", duplicates=duplicates)
        task = TaskConfig(train=source, evaluation=source, max_prompt_tokens=9, overlong_prompts="error")
        if duplicates == "error":
            with pytest.raises(ConfigError, match="id 'a'"):
                load_source(source, task, tokenizer, rewards, "task.train")
        else:
            assert [prompt.id for prompt in load_source(source, task, tokenizer, rewards, "task.train")] == ["a"]
