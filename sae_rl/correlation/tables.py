"""Figures as rows of text, for the terminal, Markdown and the page; and in words what could not be told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sae_rl.correlation.figures import BATCHES, Tree
from sae_rl.evaluation.statistics import UNKNOWN, Estimate
from sae_rl.records.metrics import show

SHOWN_BATCH = BATCHES.index(64)
OF_TOKEN, OF_SEGMENT = ("references", "token", "estimators"), ("references", "segment", "estimators")
OF_GRADIENT = ("gradients", "estimators")


Path = tuple[str | int, ...]  # names and indices that lead to a figure


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table whose first column has names."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    about: str


def cell(estimate: Estimate) -> str:
    """A number and its interval; a dash where it could not be told."""
    if math.isnan(estimate.value):
        return "-"
    numbers = [estimate.value, estimate.low, estimate.high]
    fixed = 0.01 <= max(abs(number) for number in numbers if not math.isnan(number)) < 10
    value, low, high = (f"{number:.3f}" if fixed else show(number) for number in numbers)
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def at(tree: Tree | None, *path: str | int) -> Estimate:
    """The figure at a path of names and indices; unknown where the measurements do not have it."""
    found: Any = tree
    for key in path:
        if found is None or (isinstance(found, dict) and key not in found):
            return UNKNOWN
        found = found[key]
    assert isinstance(found, Estimate), path
    return found


def tables_of(tree: Tree) -> list[TextTable]:
    """The advantages, the gradients where they were measured, and the differences from each baseline."""
    return [_advantages(tree), *([_gradients(tree)] if tree["gradients"] else []), *_differences(tree)]


def summary_of(tree: Tree) -> TextTable:
    """The figures that fit a terminal."""
    columns = {
        "Pearson": (OF_TOKEN, ("pearson",)),
        "without noise": (OF_TOKEN, ("pearson_corrected",)),
        "slope": (OF_TOKEN, ("slope",)),
        "Pearson, segments": (OF_SEGMENT, ("pearson",)),
        "gradient: cosine": (OF_GRADIENT, ("cosine",)),
        "worth": (OF_GRADIENT, ("worth", BATCHES.index(1))),
    }
    about = "Worth: how many responses of Monte Carlo one response is worth, in a batch of 1 prompt."
    return _table(tree, "Advantages and gradients beside Monte-Carlo references", about, columns)


def _table(
    tree: Tree, title: str, about: str, columns: Mapping[str, tuple[Path, Path]], without: str = ""
) -> TextTable:
    """A row for each estimator, and columns of figures by the path before and after its name."""
    rows = [
        [name, *(cell(at(tree, *before, name, *after)) for before, after in columns.values())]
        for name in tree["estimators"]
        if name != without
    ]
    return TextTable(title, ["", *columns], rows, about)


def _advantages(tree: Tree) -> TextTable:
    columns = {
        "Pearson": (OF_TOKEN, ("pearson",)),
        "without noise": (OF_TOKEN, ("pearson_corrected",)),
        "Spearman": (OF_TOKEN, ("spearman",)),
        "slope": (OF_TOKEN, ("slope",)),
        "mean error": (OF_TOKEN, ("mean_error",)),
        "Pearson, segments": (OF_SEGMENT, ("pearson",)),
        "own segments": (("own_segments",), ("pearson",)),
    }
    about = (
        f"With the token reference on {tree['references']['token']['tokens']:,} tokens, whose reliability is "
        f"{cell(at(tree, 'references', 'token', 'reliability'))}."
    )
    if tree["segments_of"]:
        about += f" Pearson, segments: with the paper's reference by the segments of {tree['segments_of']}."
    table = _table(tree, "Advantages", about + " Own segments: by the estimator's own.", columns)
    segment_tokens = [each["segment_tokens"] for each in tree["estimators"].values()]
    lengths = ["-" if math.isnan(one) else show(one) for one in segment_tokens]
    rows = [[row[0], length, *row[1:]] for row, length in zip(table.rows, lengths, strict=True)]
    return replace(table, header=["", "tokens per segment", *columns], rows=rows)


def _gradients(tree: Tree) -> TextTable:
    n, one = BATCHES[SHOWN_BATCH], BATCHES.index(1)
    columns = {
        "cosine": (OF_GRADIENT, ("cosine",)),
        "squared bias": (OF_GRADIENT, ("squared_bias",)),
        "variance of a prompt": (OF_GRADIENT, ("variance",)),
        f"norm, {n} prompts": (OF_GRADIENT, ("norm", SHOWN_BATCH)),
        f"cosine, {n} prompts": (OF_GRADIENT, ("expected_cosine", SHOWN_BATCH)),
        f"squared error, {n} prompts": (OF_GRADIENT, ("squared_error", SHOWN_BATCH)),
        "worth, 1 prompt": (OF_GRADIENT, ("worth", one)),
        f"worth, {n} prompts": (OF_GRADIENT, ("worth", SHOWN_BATCH)),
    }
    about = (
        "Against the gradient of reference advantages. Worth: how many responses of Monte Carlo give the expected cosine of "
        "one response."
    )
    return _table(tree, "Gradients", about, columns)


def _differences(tree: Tree) -> Iterator[TextTable]:
    about = "Paired on the same prompts and responses. An interval that holds 0 does not tell a difference."
    for baseline in tree["baselines"]:
        minus = ("minus", baseline)
        columns = {
            "Pearson": (OF_TOKEN, (*minus, "pearson")),
            "without noise": (OF_TOKEN, (*minus, "pearson_corrected")),
            "Spearman": (OF_TOKEN, (*minus, "spearman")),
            "slope": (OF_TOKEN, (*minus, "slope")),
            "Pearson, segments": (OF_SEGMENT, (*minus, "pearson")),
            "cosine of gradients": (OF_GRADIENT, (*minus, "cosine")),
        }
        yield _table(tree, f"Difference from {baseline}", about, columns, without=baseline)


def notes_of(tree: Tree) -> list[str]:
    """What these measurements do not tell, and why, in sentences."""
    notes = []
    prompts, k = tree["num_prompts"], tree["continuations"]
    if prompts < 20:
        notes.append(f"{prompts} prompts are few: their intervals are rough.")
    if tree["continuations_failed"]:
        failed = show(tree["continuations_failed"], "fraction")
        notes.append(f"{failed} of the continuations failed their check; the others of their places stand for them.")
    if not tree["returns_differ"]:
        notes.append("All responses and continuations have the same return, so that every reference advantage is 0.")
    for name, reference in tree["references"].items():
        if not reference["tokens"]:
            notes.append(f"No token has a {name} reference: its places have no continuations.")
        elif math.isnan(reference["reliability"].value):
            notes.append(f"The reliability of the {name} reference is not known from {k} continuation{'s' * (k != 1)}.")
        elif any(math.isnan(row["pearson_corrected"].value) for row in reference["estimators"].values()):
            notes.append(
                f"The reliability of the {name} reference is {cell(reference['reliability'])}, which is too small to correct "
                "correlations for its noise: more continuations or prompts are needed."
            )
        if reference["tokens"] and reference["covered"] < 1:
            share = show(reference["covered"], "fraction")
            notes.append(
                f"{share} of the {name} reference's segments have values at both ends; the others are left out."
            )
    if tree["gradients"] is None:
        return [*notes, "Gradients were not measured."]
    if prompts < 4:  # more than 2.5 % of the resamples of three hold one prompt alone
        return [*notes, "Gradients need at least four prompts."]
    reference_length, rows = tree["gradients"]["reference_length"], tree["gradients"]["estimators"]
    if not reference_length.low > 0:
        notes.append(
            f"The mean gradient of the reference is not told from 0 by {prompts} prompts: its squared length is "
            f"{cell(reference_length)}. More prompts, responses or continuations are needed for cosines."
        )
    hidden = [name for name, row in rows.items() if math.isnan(row["cosine"].value)]
    if hidden:
        notes.append(
            f"No cosine, since the squared length of its mean gradient is not told from 0: {', '.join(hidden)}."
        )
    if "worth" not in next(iter(rows.values())):
        notes.append("No estimator is called monte_carlo, so that responses have nothing to be worth.")
    elif hidden := [name for name, row in rows.items() if math.isnan(row["worth"][SHOWN_BATCH].value)]:
        notes.append(
            f"No worth at {BATCHES[SHOWN_BATCH]} prompts, since its gradient or Monte Carlo's may point away from the "
            f"reference's, or Monte Carlo reaches its cosine with no number of prompts: {', '.join(hidden)}."
        )
    return notes
