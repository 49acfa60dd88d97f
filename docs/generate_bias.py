"""Writes docs/bias.md and docs/bias.svg: the bias of SAE on a Markov chain whose values are known.

    make docs

The only reward of a chain is at its end. The critic's error at token t is at most ``ERROR e^(-DECAY t)``: it knows more the
longer the prefix is. The bias is measured on sampled chains with `sae_rl.algo.td_recursion`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_rl.algo import td_recursion

NUM_TOKENS, NUM_STATES, NUM_CHAINS = 1024, 6, 4000
ERROR, DECAY, LAM = 0.5, 0.02, 0.95
LENGTHS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]  # M, tokens of a segment; 1 is GAE, 1024 Monte Carlo
FITTED = (8, 64)  # where (1 - LAM) / DECAY = 2.5 is far below M, and M not far above 1 / DECAY = 50
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Chains:
    """Sampled chains, as flat (N,) tensors."""

    rewards: Tensor
    values: Tensor  # V of the state before each token
    errors: Tensor  # the critic's values are V + error
    offsets: Tensor  # (num_chains + 1,)


@dataclass(frozen=True, slots=True)
class Measured:
    """Results for SAE's return ``A + V`` with segments of one length."""

    length: int
    first: float  # bias at the first token
    mean: float  # mean bias over all tokens
    bound: float  # upper bound of the bias at the first token
    exact: float  # bias at the first token with an exact critic: 0 except for sampling noise
    exact_error: float  # standard error of `exact`
    std: float  # std of the advantages with an exact critic


def sample(num_chains: int, seed: int = 0) -> Chains:
    """Chains of 1024 steps over six states, which mostly stay in their state; ending in half of the states pays reward 1."""
    rng = np.random.default_rng(seed)
    moves = 0.97 * np.eye(NUM_STATES) + 0.03 * rng.dirichlet(np.ones(NUM_STATES), NUM_STATES)
    pays = np.arange(NUM_STATES) % 2
    values = np.empty((NUM_TOKENS, NUM_STATES))  # E[R | s_t], exactly, from the end
    ahead = pays.astype(float)
    for t in reversed(range(NUM_TOKENS)):
        ahead = values[t] = moves @ ahead
    states = np.empty((num_chains, NUM_TOKENS + 1), dtype=np.int64)
    states[:, 0] = rng.integers(0, NUM_STATES, num_chains)
    thresholds = moves.cumsum(1)
    for t in range(NUM_TOKENS):
        states[:, t + 1] = (rng.random((num_chains, 1)) > thresholds[states[:, t]]).sum(1).clip(max=NUM_STATES - 1)
    rewards = np.zeros((num_chains, NUM_TOKENS))
    rewards[:, -1] = pays[states[:, -1]]
    share = rng.uniform(0.5, 1, NUM_STATES)  # the error of each state, as a fraction of the envelope
    errors = ERROR * np.exp(-DECAY * np.arange(NUM_TOKENS)) * share[states[:, :-1]]
    known = values[np.arange(NUM_TOKENS), states[:, :-1]]
    flat = (torch.from_numpy(array.reshape(-1)) for array in (rewards, known, errors))
    return Chains(*flat, offsets=torch.arange(num_chains + 1) * NUM_TOKENS)


def bound(length: int) -> float:
    """``C (1 - lam) / (e^(beta M) - lam)``, the sum of `(1 - lam) lam^(k-1) C e^(-beta k M)` over boundaries k."""
    return ERROR * (1 - LAM) / (math.exp(DECAY * length) - LAM)


def measure(chains: Chains, length: int) -> Measured:
    opens = torch.arange(NUM_TOKENS).repeat(len(chains.offsets) - 1) % length == 0

    def returns_and_advantages(values: Tensor) -> tuple[Tensor, Tensor]:
        settings = {"gamma": 1.0, "lam": LAM, "value_lam": LAM}
        advantages, returns = td_recursion(chains.rewards, values, opens, chains.offsets, **settings)
        return returns.view(-1, NUM_TOKENS), advantages

    exact, advantages = returns_and_advantages(chains.values)
    wrong, _ = returns_and_advantages(chains.values + chains.errors)
    off = exact[:, 0] - chains.values.view(-1, NUM_TOKENS)[:, 0]
    return Measured(
        length=length,
        first=float((wrong - exact)[:, 0].mean()),
        mean=float((wrong - exact).mean()),
        bound=bound(length),
        exact=float(off.mean()),
        exact_error=float(off.std() / math.sqrt(len(off))),
        std=float(advantages.std()),
    )


def slope(found: Sequence[Measured], bias: str) -> float:
    """Least-squares slope of log bias over log M, for M within FITTED."""
    inside = [one for one in found if FITTED[0] <= one.length <= FITTED[1]]
    lengths, biases = [one.length for one in inside], [getattr(one, bias) for one in inside]
    return float(np.polyfit(np.log(lengths), np.log(biases), 1)[0])


def page(found: Sequence[Measured]) -> str:
    rows = [
        f"| {one.length} | {_number(one.first)} | {_number(one.bound)} | {_number(one.mean)} | "
        f"{one.exact:+.4f} ± {one.exact_error:.4f} | {one.std:.4f} |"
        for one in found
    ]
    return PAGE.format(
        error=ERROR, decay=DECAY, lam=LAM, chains=NUM_CHAINS, tokens=NUM_TOKENS, states=NUM_STATES,
        first_slope=slope(found, "first"), mean_slope=slope(found, "mean"), low=FITTED[0], high=FITTED[1],
        rows="\n".join(rows),
    )  # fmt: skip


def plot(found: Sequence[Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bias"
    from matplotlib import pyplot

    shown = [one for one in found if one.first > 1e-5]
    lengths = [one.length for one in shown]
    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    axes.loglog(lengths, [one.bound for one in shown], "--", color="0.5", label="bound at the first token")
    axes.loglog(lengths, [one.first for one in shown], "o-", label="bias at the first token")
    axes.loglog(lengths, [one.mean for one in shown], "s-", label="bias, mean over tokens")
    anchor = next(one for one in shown if one.length == FITTED[0])
    axes.loglog(FITTED, [anchor.mean * anchor.length / m for m in FITTED], ":", color="k", label="1 / M")
    axes.set_xlabel("M, tokens per segment")
    axes.set_ylabel("bias of the return")
    axes.set_xticks(lengths, [str(m) for m in lengths])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _number(bias: float) -> str:
    return f"{bias:.5f}" if abs(bias) >= 5e-6 else "0"


PAGE = """# Segments and the bias of a wrong critic

Written by `make docs`.

SAE's paper (arXiv 2601.07320) bounds the bias of SAE for segments of M tokens and a critic whose error lies under an
exponential envelope. The bound falls like 1/M. This page derives the bound and measures the bias on a Markov chain whose
values are known.

Let the critic's error at token t be at most `C e^(-beta t)`: the critic knows more the longer the prefix is. SAE's return
bootstraps from the critic only where a segment opens. For the first token, the k-th such place is token k M, with weight
`(1 - lam) lam^(k-1)`. So the bias of `A + V` at the first token is at most

    sum over k of (1 - lam) lam^(k-1) C e^(-beta k M)  =  C (1 - lam) / (e^(beta M) - lam)
                                                      <=  C (1 - lam) / (1 - lam + beta M)

GAE is the case M = 1. It bootstraps at every token, including the first ones, where the critic knows least. Monte Carlo
never bootstraps. If the critic's error is C at every token instead, the bias is `C (1 - lam^K)` with K boundaries ahead, so
M matters only where few boundaries are left.

The chain has {states} states, {tokens} tokens and one reward at the end; {chains} chains are sampled. lam = {lam}, C =
{error}, beta = {decay}, and the error of a state lies between half of the envelope and the whole envelope. The advantages
are computed by `sae_rl.algo.td_recursion` with segments of M tokens. The bias is their difference from the advantages under
the exact critic on the same chains. Fitted from M = {low} to {high}, the bias falls like M^{first_slope:.2f} at the first
token and like M^{mean_slope:.2f} on average over all tokens. For larger M it falls faster, because the first boundary then
lies behind most of the error.

![bias over M](bias.svg)

| M | bias, first token | bound | bias, mean over tokens | with an exact critic | std of advantages |
|--:|--:|--:|--:|--:|--:|
{rows}

With an exact critic the expectation is the same for every M, because these segments do not depend on the sampled tokens.
Longer segments cost variance, as the last column shows.
"""


def main() -> None:
    chains = sample(NUM_CHAINS)
    found = [measure(chains, length) for length in LENGTHS]
    (HERE / "bias.md").write_text(page(found))
    plot(found, HERE / "bias.svg")


if __name__ == "__main__":
    main()
