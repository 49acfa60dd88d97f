"""What can be known about a model without loading it: its weights are there and readable, and its tokenizer fits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open

from sae_rl.backends.logprobs import cap_of_logits
from sae_rl.config.schema import Config
from sae_rl.data.hub import files_on_hub
from sae_rl.settings import ConfigError
from sae_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or their parts, which WEIGHTS.index.json lists
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Type of model -> the classes in its tokenizer_config.json that AutoTokenizer takes as they are.
TRUSTED = {
    "qwen3": ("TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer"),
    "qwen3_moe": ("TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer"),
    "gpt2": ("TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer"),
}
NO_TOKENIZER = re.compile(r"config\.json|generation_config\.json|.*\.(safetensors|bin|index\.json|md)|\..*")
LFS = b"version https://git-lfs"


def check_model(key: str, path: str, *, generates: bool = True) -> dict[str, int] | None:
    """Checks the configuration and the weights of a model.

    Args:
        path: a folder or a name on the hub.
        generates: it must be a language model; otherwise any architecture will do.

    Returns:
        The number of parameters in each of its tensors; None: it will be downloaded, or its files do not say.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    try:
        folder = Path(path) if Path(path).is_dir() else _downloaded(path)
        if folder is None:
            return None
        architectures = _read_config(folder).get("architectures") or []
        if generates and architectures and not any(name.endswith(GENERATES) for name in architectures):
            raise ValueError(f"it is a {', '.join(architectures)}, but a policy is a language model")
        return _check_weights(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{key} = {path}: {str(error).strip().splitlines()[0]}"]) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json. Raises ValueError if transformers has no such type of model.

    `AutoConfig` would say so too, but its classes import all that generates text, which takes seconds.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if not isinstance(config, dict):
        raise ValueError(f"config.json must hold an object, found {type(config).__name__}")
    kind = config.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING:
        raise ValueError(f"config.json has model_type = {kind!r}, which the installed transformers does not know")
    return config


def _downloaded(name: str) -> Path | None:
    """The folder of a model in the hub's cache; None: the hub has it, and its weights will be downloaded."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        folder = None
    if folder is not None and _weight_files(folder):
        return folder
    if is_offline_mode():
        raise ValueError("its weights are not in the hub's cache, and HF_HUB_OFFLINE forbids to download them")
    try:
        files = files_on_hub(name, "model")
    except ConnectionError as error:
        raise ValueError(
            f"it is neither a folder here nor in the hub's cache, and the hub gave none ({error})"
        ) from error
    if not any(file in (weights, f"{weights}.index.json") for weights in WEIGHTS for file in files):
        raise ValueError(f"on the hub it has neither {' nor '.join(WEIGHTS)}")
    return None


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """The files with weights -> the tensors that each must have; empty: there are none."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return {name: set()}
        if (index := folder / f"{name}.index.json").exists():
            try:
                places: dict[str, str] = json.loads(index.read_text())["weight_map"]
                return {file: {tensor for tensor, at in places.items() if at == file} for file in set(places.values())}
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{index.name} cannot be read ({error!r})") from error
    return {}


def _check_weights(folder: Path) -> dict[str, int] | None:
    files = _weight_files(folder)
    if not files:
        raise ValueError(f"the folder has no weights: neither {' nor '.join(WEIGHTS)}")
    if missing := sorted(name for name in files if not (folder / name).exists()):
        raise ValueError(f"{len(missing)} of {len(files)} files with weights are missing: {', '.join(missing[:5])}")
    sizes: dict[str, int] = {}
    for name, wanted in sorted(files.items()):
        with (folder / name).open("rb") as file:
            if file.read(len(LFS)) == LFS:
                raise ValueError(f"{name} is a pointer of git-lfs; fetch the weights with `git lfs pull`")
        if name.endswith(".safetensors"):
            sizes |= (found := _tensors(folder / name))
            if lacking := sorted(wanted - found.keys()):
                raise ValueError(f"{name} lacks {len(lacking)} of the tensors in its index, such as {lacking[0]}")
    return sizes or None


def _tensors(file: Path) -> dict[str, int]:
    """The number of parameters of each tensor. Reading the header also tells whether the file is complete."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file.name} cannot be read; it may have been cut ({error})") from error


def load_tokenizer(path: str, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises ConfigError if there is none."""
    none = ConfigError([f"{key} = {path}: the folder has no tokenizer; add the files of its tokenizer"])
    folder = Path(path)
    if folder.is_dir() and all(NO_TOKENIZER.fullmatch(file.name) for file in folder.iterdir()):
        raise none  # to ask AutoTokenizer would take two seconds
    loader: Any = _tokenizer_class(path)
    if loader is None:
        from transformers import AutoTokenizer

        loader = AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{key} = {path}: no tokenizer can be loaded from there ({error})"]) from error
    if len(tokenizer) < 2:  # transformers returns an empty tokenizer for a folder without tokenizer files
        raise none
    return tokenizer


def _tokenizer_class(path: str) -> Any:
    """The class that `AutoTokenizer` would take, where two files of a model say so; None: it must be asked.

    To import `AutoTokenizer` takes two seconds, since it imports all that generates text.
    """
    import transformers

    try:
        folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, local_files_only=True))
        kind = _read_config(folder).get("model_type")
        named = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):  # LocalEntryNotFoundError is one of both
        return None
    if kind not in TRUSTED or "auto_map" in named or (name := named.get("tokenizer_class")) not in TRUSTED[kind]:
        return None
    return getattr(transformers, name)


def _text_config(key: str, path: str) -> Any:
    """transformers' configuration of a language model. Raises ConfigError if transformers cannot read it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError([f"{key} = {path}: {str(error).strip().splitlines()[0]}"]) from error


def check_vocabulary(path: str, prompts: Iterable[Prompt]) -> None:
    """Raises ConfigError if transformers does not know the model, or if a prompt has a token that the model does not know.

    A tokenizer may well have more tokens than its model, such as one for padding, if no prompt has them.
    """
    model = _text_config("model.path", path)
    for prompt in prompts:
        if (largest := max(prompt.token_ids)) >= model.vocab_size:
            found = f"the prompt {prompt.id!r} has the token {largest}, but the model knows {model.vocab_size} tokens"
            raise ConfigError([f"model.path = {path}: {found}; take the tokenizer that belongs to the model"])


def check_computed(config: Config) -> None:
    """Raises ConfigError if the policy has parts that `sae_rl.backends` does not compute."""
    key, path = "model.path", config.model.path
    model = _text_config(key, path)
    if (cap := cap_of_logits(model.to_dict())) is not None:
        raise ConfigError([f"{key} = {path}: it caps its logits at {cap:g}; such models cannot be trained"])
    if getattr(model, "attn_logit_softcapping", None) is not None and config.model.attention != "eager":
        raise ConfigError([f"{key} = {path}: it caps the scores of its attention: set model.attention=eager"])


def check_critics_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a critic of another model reads the policy's tokens as what they are.

    Both may have more tokens, such as rows of padding in an embedding.

    Raises:
        ConfigError: a token of the policy has another id or none in the critic's tokenizer, or is beyond its embedding.
    """
    key, path, policy = config.critic_model_key, config.critic_model.path, config.model.path
    if path == policy:
        return
    size, critics_size = (_text_config(*each).vocab_size for each in (("model.path", policy), (key, path)))
    ours = {token: i for token, i in tokenizer.get_vocab().items() if i < size}
    theirs = load_tokenizer(path, key).get_vocab()
    other = sorted((i, token) for token, i in ours.items() if theirs.get(token) != i)
    if other:
        (i, token), found = other[0], f"{len(other):,} of the {len(ours):,} tokens of model.path = {policy} differ"
        told = f"such as {token!r}, which is {i} there and {theirs.get(token, 'unknown')} here"
        raise ConfigError([f"{key} = {path}: {found}, {told}; choose a model with the same tokenizer"])
    if (largest := max(ours.values())) >= critics_size:
        raise ConfigError([f"{key} = {path}: it knows {critics_size:,} tokens, but {policy} has the token {largest:,}"])
