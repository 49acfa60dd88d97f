"""The form of a response: tags, or a regular expression."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import regex  # type: ignore[import-untyped]

from sae_rl.knobs import Knobs, number
from sae_rl.rewards.verdict import Sample, TimeLimit, Verdict


@dataclass(frozen=True, slots=True)
class Format(Knobs):
    """1 if the regular expression matches, and each of the tags stands once in the response, in their order.

    If the prompt ends with the first opening tag, the response begins with it.
    """

    pattern: str = ""  # in the syntax of the library regex; empty: none
    anywhere: bool = False  # the pattern may match a part of the response
    tags: tuple[str, ...] = ()  # for example think, answer: <think>...</think>...<answer>...</answer>
    only_tags: bool = False  # nothing but white space stands before, between and after the tagged parts
    timeout_s: float = number(1.0, low=0, above_low=True)  # for the pattern; after that the check fails

    def check_together(self) -> None:
        if not self.pattern and not self.tags:
            raise ValueError("Format has neither a pattern nor tags, but it needs one of them")
        if self.only_tags and not self.tags:
            raise ValueError("Format.only_tags = true, but Format.tags is empty")
        if not all(regex.fullmatch(r"\w+", tag) for tag in self.tags) or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"Format.tags = {self.tags}: they must be different names without <, > or /")
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"Format.pattern = {self.pattern!r} is not a regular expression: {error}") from None

    def time_limit(self) -> TimeLimit:
        return TimeLimit(self.timeout_s, "timeout_s")

    def __call__(self, sample: Sample) -> Verdict:
        """Raises TimeoutError if the pattern takes too long."""
        if wrong := self.wrong_tags(sample):
            return Verdict(0.0, wrong)
        if self.pattern:
            compiled = regex.compile(self.pattern, regex.DOTALL)
            match = compiled.search if self.anywhere else compiled.fullmatch
            try:
                found = match(sample.response, timeout=self.timeout_s)
            except TimeoutError:
                limit = f"Format.timeout_s = {self.timeout_s:g} on {len(sample.response)} characters"
                raise TimeoutError(f"format: {self.pattern!r} found no end within {limit}") from None
            if found is None:
                return Verdict(0.0, f"does not match {self.pattern}")
        return Verdict(1.0, "has the format")

    def wrong_tags(self, sample: Sample) -> str:
        """What is wrong with the tags; empty if nothing is."""
        text = sample.response
        if self.tags and sample.prompt.rstrip().endswith(f"<{self.tags[0]}>"):
            text = f"<{self.tags[0]}>{text}"
        places = [0]
        for mark in [f"<{end}{tag}>" for tag in self.tags for end in ("", "/")]:
            if text.count(mark) != 1:
                return f"has {mark} {text.count(mark)} times instead of once"
            start = text.find(mark)
            if start < places[-1]:
                return f"has {mark} too early: the order is {', '.join(self.tags)}"
            places += [start, start + len(mark)]
        parts = [text[start:end] for start, end in pairwise([*places, len(text)])]
        # Every fourth part is outside: then follow an opening tag, what it encloses, and its closing tag.
        if self.only_tags and any(part.strip() for part in parts[::4]):
            return f"has text outside of {', '.join(self.tags)}"
        return ""
