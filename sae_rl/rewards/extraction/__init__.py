"""What a response answers, as text and as numbers: for the verifiers of mathematics, of numbers and of choices.

`final_answer` finds the final answer of a response, `markup` brings LaTeX into one form, and `numbers` reads numbers with
their units.
"""
