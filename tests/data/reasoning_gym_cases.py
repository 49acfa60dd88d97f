"""Published answers and their scores, from reasoning-gym's own tests (github.com/open-thought/reasoning-gym, 49b07130)."""

from __future__ import annotations

from typing import Any

SORTED_NUMBERS = {
    "answer": "['-97.8', '-95.7', '-92.8', '-83.6', '-16.5', '61.5', '71.1']",
    "metadata": {
        "direction": "ascending",
        "sorted_numbers": ["-97.8", "-95.7", "-92.8", "-83.6", "-16.5", "61.5", "71.1"],
    },
}
GROUPS = {"metadata": {"solution": [["ate", "eat", "tea"], ["bat"], ["nat", "tan"]]}}
PARTS = {"metadata": {"solution": [["no", "on"], ["noon"], ["n", "o", "o", "n"]]}}
MATRIX = [list("XXXXX"), list("X*OOX"), list("XOXOX"), list("XOO#X")]
NEARER = [list("XXXXX"), list("X*O#X"), list("XOXOX"), list("XOOOX")]
INSERTED = "AABCDAEEEEEEEBCDEBAAAAA"

# (task, the part of an entry that its rule reads, answer, score)
CASES: list[tuple[str, dict[str, Any], str, float]] = [
    ("countdown", {"metadata": {"numbers": [44, 3], "target": 47}}, "45+2", 0.05),
    ("countdown", {"metadata": {"numbers": [1, 45, 2, 3], "target": 50}}, "45+2+3", 0.05),
    ("number_format", {"metadata": {"solution": 54245.32}}, "54,245.32", 1.0),
    ("number_format", {"metadata": {"solution": 54245.32}}, "5.424532e+04", 1.0),
    ("number_format", {"metadata": {"solution": 54245.32}}, "54245.9", 0.0),
    ("number_sorting", SORTED_NUMBERS, "['-97.8', '-95.7', '-92.85', '-83.6', '-16.5', '61.5', '71.08']", 1.0),
    ("number_sorting", SORTED_NUMBERS, "['-16.5', '-83.6', '-92.85', '-95.7', '-97.8', '61.5', '71.08']", 0.0),
    ("number_sorting", SORTED_NUMBERS, "['-97.8', '-95.7', '-91.0', '-83.6', '-16.5', '61.5', '72.0']", 0.0),
    ("group_anagrams", GROUPS, '[["bat"], ["nat", "tan"], ["ate", "eat", "tea"]]', 1.0),
    ("group_anagrams", GROUPS, '[["ate", "eat"], ["bat", "tea"], ["nat", "tan"]]', 0.01),
    ("palindrome_partitioning", PARTS, '[["n", "o", "o", "n"], ["no", "on"], ["noon"]]', 1.0),
    ("palindrome_partitioning", PARTS, '[["n", "o", "o", "n"], ["no", "on"]]', 0.0),
    (
        "shortest_path",
        {"answer": "right right down down", "metadata": {"matrix": MATRIX}},
        "down down right right",
        1.0,
    ),
    (
        "shortest_path",
        {"answer": "right right down down", "metadata": {"matrix": MATRIX}},
        "right down right down",
        0.0,
    ),
    ("shortest_path", {"answer": "right right", "metadata": {"matrix": NEARER}}, "down down right right up up", 0.5),
    ("binary_matrix", {"answer": "0 0 0\n0 1 0\n1 2 1"}, "0 0 0\n0 1 0\n1 2 1", 1.0),
    ("binary_matrix", {"answer": "0 0 0\n0 1 0\n1 2 1"}, "[[0, 0, 0], [0, 1, 0], [1, 2, 1]]", 0.1),
    ("string_insertion", {"answer": INSERTED}, INSERTED, 1.0),
    ("string_insertion", {"answer": INSERTED}, str(list(INSERTED)), 0.1),
    ("word_sorting", {"metadata": {"sorted_words": ["apple", "banana", "cherry"]}}, "apple,banana,        cherry", 1.0),
    ("word_sorting", {"metadata": {"sorted_words": ["apple", "banana", "cherry"]}}, "banana, cherry, apple", 0.2),
    ("word_sorting", {"metadata": {"sorted_words": ["apple", "banana", "cherry"]}}, "gibberish", 0.0),
    ("power_function", {"answer": "-8.000000"}, "-8.00", 1.0),
    ("power_function", {"answer": "1000.0"}, "999.0", 0.01),
]
