"""Equality of mathematical answers.

`verifier` is the verifier ``math``. `answers` reads what an answer says, and `equality` compares two of them, with
`expressions` (what sympy reads) and `formulas` (compared by their values).
"""
