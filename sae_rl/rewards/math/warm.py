"""Imported by the server that forks reward processes, so that none of them has to learn the grammar of LaTeX by itself.

math-verify's parser builds its tables as it meets new forms, which takes it up to a second for each; forked processes share
what is there.
"""

from __future__ import annotations

from sae_rl.rewards.math import expressions

FORMS = (
    r"2\sqrt{3}",
    r"\frac{\sqrt{5}-1}{2}",
    r"-\sqrt[3]{2}+1",
    r"3\pi",
    r"x^2-3x+2",
    r"(x-1)(x+2)",
    r"a+b^{n-1}",
    r"\frac{n(n+1)}{2}",
    r"2^{10}-1",
    r"x=2,y=-3",
    r"y=2x+1",
    r"(1,-2)",
    r"(\frac{1}{2},3,x)",
    r"(1,2),(3,4)",
    r"[0,1)",
    r"[-1,1]",
    r"(-\infty,2]\cup[3,\infty)",
    r"\{1,2,-3\}",
    r"1,2,3",
    r"1<x\le 2",
    r"x\ge 5",
    r"3+4i",
    r"e^{2x}+\ln x",
    r"\sin x+\cos(2x)",
    r"\log_2 8",
    r"\binom{5}{2}+4!",
    r"\begin{pmatrix}1&2\\-3&\frac{1}{2}\end{pmatrix}",
    r"|x-1|",
    r"1.5x",
    r"\lfloor\frac{n}{2}\rfloor-\lceil\sqrt{n}\rceil",
    r"(-1)^{n+1}2^n",
    r"\sum_{k=1}^{n}k^2",
)

for form in FORMS:
    expressions.parsed(form)
