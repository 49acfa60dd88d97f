"""The text of each token of a response, so that all of them together are the response's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise

DecodeText = Callable[[list[int]], str]  # all tokens to one text
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character
LONGEST_RUN = 256  # tokens that are decoded together; only bytes that are no text have longer runs


class TokenTexts:
    """Texts of tokens. What was decoded once is kept, since most pairs of neighbours occur often.

    A tokenizer may write a token otherwise at the start of a text, so each is decoded behind its neighbour. A character that
    is spread over several tokens belongs to the last of them, and those before it have an empty text.
    """

    def __init__(self, decode: DecodeText) -> None:
        self._decode = decode
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, token_ids: Sequence[int], before: int | None = None) -> list[str]:
        """The text of every token; ``before`` is the last token of the prompt."""
        texts = list[str]()
        for is_part, found in groupby(token_ids, lambda token: REPLACEMENT in self._text((token,))):
            run = list(found)
            if is_part:
                for start in range(0, len(run), LONGEST_RUN):
                    texts += self._parts(run[start : start + LONGEST_RUN])
                before = run[-1]
                continue
            for token in run:
                texts.append(self._behind(before, token))
                before = token if self._text((token,)) else before  # a special token that is left out begins no text
        return texts

    def _behind(self, before: int | None, token: int) -> str:
        alone = self._text((token,))
        if before is None:
            return alone
        start, both = self._text((before,)), self._text((before, token))
        text = both[len(start) :]
        return text if both.startswith(start) and REPLACEMENT not in text else alone

    def _parts(self, run: list[int]) -> list[str]:
        """The texts of neighbours none of which is text by itself: each has what is settled once it is there."""
        whole = self._decode(run)
        settled = [_shared(whole, self._decode(run[:end])) for end in range(1, len(run))]
        ends = accumulate([0, *settled, len(whole)], max)
        return [whole[start:end] for start, end in pairwise(ends)]

    def _text(self, token_ids: tuple[int, ...]) -> str:
        if (text := self._known.get(token_ids)) is None:
            text = self._known[token_ids] = self._decode(list(token_ids))
        return text


def _shared(a: str, b: str) -> int:
    """Characters with which both texts begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
