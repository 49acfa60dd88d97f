"""The class of a tokenizer is the one that AutoTokenizer takes, and is found without importing all that generates text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae_rl.commands.model_files import TRUSTED, _tokenizer_class, load_tokenizer

TEXT = "Level 12 drifts by -3.\n\nThen it's held: naïve, 数学!  <|im_start|>user"


def write(folder: Path, kind: str, name: str, **more: object) -> str:
    """A model's folder with a small byte-level tokenizer of that class, and no weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<|im_start|>"])
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name} | more))
    return str(folder)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in TRUSTED.items() for name in names])
def test_a_tokenizer_is_that_of_auto_tokenizer(kind: str, name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", kind, name)
    assert _tokenizer_class(folder) is not None
    found, expected = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()  # type: ignore[attr-defined]
    assert found(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.chat_template == expected.chat_template and found.model_max_length == expected.model_max_length


@pytest.mark.parametrize(
    ("kind", "name", "more"),
    [
        ("qwen2", "TokenizersBackend", {}),  # AutoTokenizer takes Qwen2Tokenizer instead
        ("qwen3", "LlamaTokenizer", {}),
        ("qwen3", "TokenizersBackend", {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}),
    ],
)
def test_auto_tokenizer_is_asked_where_two_files_do_not_say(
    kind: str, name: str, more: dict[str, object], tmp_path: Path
) -> None:
    assert _tokenizer_class(write(tmp_path / "model", kind, name, **more)) is None


@pytest.mark.parametrize("mistake", ["long prompt", "no tokenizer"])
def test_a_mistake_is_told_without_importing_what_generates_text(
    mistake: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    folder, said = tiny_model, "prompts exceed max_prompt_tokens = 1"
    if mistake == "no tokenizer":
        folder, said = tmp_path / "bare", "the folder has no tokenizer"
        shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    arguments = ["train", f"model.path={folder}", "task=file", "task.train.path=rows.jsonl"]
    arguments += ["task.train.reward=math", "task.max_prompt_tokens=1", "rollout.prompts_per_step=1"]
    arguments += ["rollout.max_response_tokens=64", "learner.critic_pretraining.num_prompts=0"]
    code = "import sys; from sae_rl.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr
    imported = set(done.stdout.split())
    assert "transformers" in imported
    assert not imported & {
        "transformers.generation.utils",
        "torch._dynamo",
        "torch.distributed.tensor",
        "sympy",
        "datasets",
    }
