"""Equality of mathematical answers.

`verifier` is the verifier ``math``. `final_answer` finds the final answer of a response; `answers` reads what it says, with
`markup` (LaTeX as text) and `numbers` (with units); `equality` compares two answers, with `expressions` (what sympy reads),
`formulas` (compared by their values) and `number_sizes` (so that nothing is evaluated that nobody could write out).
"""
