"""How published files lay out their rows: which columns hold what, and what part of an answer counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from sae_rl.data.rows import BrokenRow, shown

LayoutName = Literal["own", "verl", "dapo_math", "gsm8k"]
GSM8K_MARK = "####"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a row keeps what we need; a dot goes into a nested object, as in ``reward_model.ground_truth``.

    A row needs ``prompt`` and ``answer``. A row without the other columns gets its position in the file as id, and the
    reward and the task of the source.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    id: str = "id"
    reward: str = "reward"
    task: str = "task"
    named: frozenset[str] = frozenset()  # columns that a user chose: a row must have one, whatever it is
    gold: Callable[[str], str] | None = None  # takes the answer that counts out of the column; None: all of it

    def with_columns(self, columns: Mapping[str, str | None]) -> Layout:
        """Columns of other names; None: as they are."""
        names = {field.name for field in fields(self)} - {"named", "gold"}
        assert columns.keys() <= names, f"a layout has the columns {names}"
        given: dict[str, Any] = {name: column for name, column in columns.items() if column is not None}
        return replace(self, named=frozenset(given), **given)


def gsm8k_gold(answer: str) -> str:
    """The number behind ``####``, without the commas between thousands. Raises BrokenRow if there is none."""
    solution, mark, gold = answer.rpartition(GSM8K_MARK)
    if not mark or not gold.strip():
        end = solution if mark else gold
        raise BrokenRow(f"nothing is behind '{GSM8K_MARK}', where GSM8K has its result: it ends in {shown(end[-40:])}")
    return gold.strip().replace(",", "")


_VERL = Layout(answer="reward_model.ground_truth", id="extra_info.index", task="data_source")

LAYOUTS: dict[LayoutName, Layout] = {
    "own": Layout(),
    "verl": _VERL,
    "dapo_math": _VERL,  # as published it holds every problem many times: read it with duplicates: drop
    "gsm8k": Layout(prompt="question", gold=gsm8k_gold),
}
