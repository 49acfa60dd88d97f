"""Texts of tokens, against what the tokenizer makes of all tokens together."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sae_rl.analysis.token_texts import TokenTexts

PIECES = ["<unk>", "▁", "▁the", "▁x", "y", "z", *(f"<0x{byte:02X}>" for byte in range(256))]
Decode = Callable[[list[int]], str]


def decoder_of(tokenizer: Tokenizer) -> Decode:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """As GPT-2 and Qwen, with a token for each byte, so that every character beyond ASCII is split."""
    tokenizer = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Decode:
    """As Llama 2: a space at the start of a text is left out, and bytes stand for characters that the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return decoder_of(tokenizer)


def test_split_characters_spaces_newlines_and_special_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a €\n\n  😀ï</script><eos>").ids
    found = TokenTexts(decoder_of(byte_level))(ids)
    expected = ["a", " ", "", "", "€", "\n", "\n", " ", " ", "", "", "", "😀", "", "ï", *"</script>", "<eos>"]
    assert found == expected


def test_together_they_are_the_text_whatever_the_bytes(byte_level: Tokenizer) -> None:
    draw, decode = random.Random(0), decoder_of(byte_level)
    texts = TokenTexts(decode)
    for _ in range(2000):
        ids = [draw.randrange(257) for _ in range(draw.randrange(1, 30))]
        found = texts(ids)
        assert len(found) == len(ids) and "".join(found) == decode(ids)


def test_a_space_that_opens_no_text_is_kept(byte_fallback: Decode) -> None:
    parts = [PIECES.index(f"<0x{byte:02X}>") for byte in "€\n".encode()]
    ids = [2, 3, 4, 1, *parts, 2]
    found = TokenTexts(byte_fallback)(ids, before=2)
    assert found == [" the", " x", "y", " ", "", "", "€", "\n", " the"]
    assert byte_fallback([2, *ids]) == "the" + "".join(found)


def test_words_with_a_space_between() -> None:
    words = ["one", "two", ""]  # the last one is a special token that the decoder leaves out
    texts = TokenTexts(lambda ids: " ".join(words[i] for i in ids if words[i]))
    assert texts([0, 1, 2, 0]) == ["one", " two", "", " one"] and texts([0, 1], before=1) == [" one", " two"]


def test_bytes_that_are_no_text_take_no_square_of_their_number(byte_level: Tokenizer) -> None:
    decoded = 0

    def decode(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decoder_of(byte_level)(ids)

    stray = byte_level.token_to_id("Ģ")
    assert "\ufffd" in decoder_of(byte_level)([stray])
    assert TokenTexts(decode)([stray] * 4096) == ["\ufffd"] * 4096
    assert decoded < 4096 * 200
