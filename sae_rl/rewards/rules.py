"""Rules about form that need no right answer: format, language, length and repetition."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import MappingProxyType

import regex  # type: ignore[import-untyped]

from sae_rl.rewards.verdict import Longest, Sample, Verdict

# First words of the Unicode names of letters.
SCRIPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "latin": ("LATIN",),
        "cjk": ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO"),
        "chinese": ("CJK", "BOPOMOFO"),
        "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
        "korean": ("HANGUL", "CJK"),
        "cyrillic": ("CYRILLIC",),
        "greek": ("GREEK",),
        "arabic": ("ARABIC",),
        "hebrew": ("HEBREW",),
        "devanagari": ("DEVANAGARI",),
        "thai": ("THAI",),
    }
)
WIDTHS = ("FULLWIDTH", "HALFWIDTH")


@dataclass(frozen=True, slots=True)
class Format:
    """1 if the response has the form: its tags in their order, each once, and an expression that matches.

    A prompt that ends with the first opening tag counts as the response's beginning.
    """

    pattern: str = ""  # regular expression, in the syntax of the library regex; empty: none
    anywhere: bool = False  # it may match a part of the response
    tags: tuple[str, ...] = ()  # think, answer: <think>...</think>...<answer>...</answer>
    only_tags: bool = False  # nothing but white space before, between and after them
    timeout_s: float = 1.0  # of the matching; beyond it the check fails

    def __post_init__(self) -> None:
        if not self.pattern and not self.tags:
            raise ValueError("Format has neither a pattern nor tags, but it needs one of them")
        if self.only_tags and not self.tags:
            raise ValueError("Format.only_tags = true, but Format.tags is empty")
        if not all(regex.fullmatch(r"\w+", tag) for tag in self.tags) or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"Format.tags = {self.tags}: they must be different names without <, > or /")
        if not math.isfinite(self.timeout_s) or self.timeout_s <= 0:
            raise ValueError(f"Format.timeout_s = {self.timeout_s}, but it must be finite and greater than 0")
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"Format.pattern = {self.pattern!r} is no regular expression: {error}") from None

    def longest(self) -> Longest:
        return Longest(self.timeout_s, "timeout_s")

    def __call__(self, sample: Sample) -> Verdict:
        """Raises TimeoutError if the expression takes too long."""
        wrong = self.tags_wrong(sample) if self.tags else ""
        if wrong:
            return Verdict(0.0, wrong)
        if self.pattern:
            compiled = regex.compile(self.pattern, regex.DOTALL)
            match = compiled.search if self.anywhere else compiled.fullmatch
            try:
                found = match(sample.response, timeout=self.timeout_s)
            except TimeoutError:
                raise TimeoutError(
                    f"format: {self.pattern!r} found no end within Format.timeout_s = {self.timeout_s:g} on "
                    f"{len(sample.response)} characters"
                ) from None
            if found is None:
                return Verdict(0.0, f"does not match {self.pattern}")
        return Verdict(1.0, "has the format")

    def tags_wrong(self, sample: Sample) -> str:
        """What is wrong with the tags; empty: nothing."""
        text = sample.response
        if sample.prompt.rstrip().endswith(f"<{self.tags[0]}>"):
            text = f"<{self.tags[0]}>{text}"
        places = [0]
        for mark in [f"<{end}{tag}>" for tag in self.tags for end in ("", "/")]:
            if text.count(mark) != 1:
                return f"has {mark} {text.count(mark)} times instead of once"
            start = text.find(mark)
            if start < places[-1]:
                return f"has {mark} too early: the order is {', '.join(self.tags)}"
            places += [start, start + len(mark)]
        between = [text[start:end] for start, end in pairwise([*places, len(text)])]
        # Outside, an opening tag, inside, a closing tag, and again.
        if self.only_tags and any(part.strip() for part in between[::4]):
            return f"has text outside of {', '.join(self.tags)}"
        return ""


@dataclass(frozen=True, slots=True)
class Language:
    """1 if at least ``min_fraction`` of the response's letters are of the script; without letters it has no language, 1."""

    script: str = "latin"
    min_fraction: float = 0.9

    def __post_init__(self) -> None:
        if self.script not in SCRIPTS:
            raise ValueError(f"Language.script = {self.script!r}, allowed: {', '.join(SCRIPTS)}")
        if not 0 <= self.min_fraction <= 1:
            raise ValueError(f"Language.min_fraction = {self.min_fraction}, but it must be in [0, 1]")

    def __call__(self, sample: Sample) -> Verdict:
        letters = {character: n for character, n in Counter(sample.response).items() if character.isalpha()}
        total = sum(letters.values())
        if not total:
            return Verdict(1.0, "has no letters")
        fraction = sum(n for character, n in letters.items() if script_of(character) in SCRIPTS[self.script]) / total
        return Verdict(
            float(fraction >= self.min_fraction), f"{100 * fraction:.1f} % of {total} letters are {self.script}"
        )


@cache
def script_of(letter: str) -> str:
    words = unicodedata.name(letter, "UNKNOWN").split()
    return words[words[0] in WIDTHS and len(words) > 1]


@dataclass(frozen=True, slots=True)
class Overlong:
    """DAPO's soft punishment of length (arXiv 2503.14476, eq. 13), to be added to another verifier's score.

    0 up to ``max_tokens - buffer_tokens``, from there in proportion down to ``-penalty`` at ``max_tokens`` and beyond.
    """

    max_tokens: int
    buffer_tokens: int
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.buffer_tokens <= self.max_tokens:
            raise ValueError(
                f"Overlong.buffer_tokens = {self.buffer_tokens}, but it must be in [1, max_tokens = {self.max_tokens}]"
            )
        if not math.isfinite(self.penalty) or self.penalty < 0:
            raise ValueError(f"Overlong.penalty = {self.penalty}, but it must be finite and at least 0")

    def __call__(self, sample: Sample) -> Verdict:
        free = self.max_tokens - self.buffer_tokens
        used = min(max((sample.num_tokens - free) / self.buffer_tokens, 0.0), 1.0)
        return Verdict(-self.penalty * used, f"{sample.num_tokens} tokens, of which {free} are free")


@dataclass(frozen=True, slots=True)
class Repetition:
    """``-penalty`` times the fraction of runs of ``num_words`` words that were in the response before."""

    num_words: int = 8
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.num_words < 1:
            raise ValueError(f"Repetition.num_words = {self.num_words}, but it must be at least 1")
        if not math.isfinite(self.penalty) or self.penalty < 0:
            raise ValueError(f"Repetition.penalty = {self.penalty}, but it must be finite and at least 0")

    def __call__(self, sample: Sample) -> Verdict:
        words = sample.response.split()
        runs = [tuple(words[i : i + self.num_words]) for i in range(len(words) - self.num_words + 1)]
        fraction = 1 - len(set(runs)) / len(runs) if runs else 0.0
        return Verdict(
            -self.penalty * fraction, f"{100 * fraction:.1f} % of runs of {self.num_words} words are repeated"
        )
