"""Writes docs/bias.md and docs/bias.svg: the bias of SAE on a Markov chain whose values are known.

    make docs

The chain has no reward but at its end. Its critic is wrong by at most ``ERROR e^(-DECAY t)``, as one that knows more the
longer it has read. What SAE makes of it is measured on sampled chains by `sae_rl.algo.td_recursion`.
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
    """Sampled chains, flat, (N,) each, and their values."""

    rewards: Tensor
    values: Tensor  # V of the state before each token
    errors: Tensor  # the critic says V + error
    offsets: Tensor  # (num_chains + 1,)


@dataclass(frozen=True, slots=True)
class Measured:
    """Of SAE's return ``A + V`` with segments of one length."""

    length: int
    first: float  # bias at the first token
    mean: float  # of the bias over all tokens
    bound: float  # of the bias at the first token
    exact: float  # bias at the first token with an exact critic, which is 0 but for the sampling
    exact_error: float  # its standard error
    std: float  # of the advantages with an exact critic


def sample(num_chains: int, seed: int = 0) -> Chains:
    """Chains of 1024 steps between six states that they mostly stay in; half of the states end with reward 1."""
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
    share = rng.uniform(0.5, 1, NUM_STATES)  # of the envelope, by state
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


def slope(found: Sequence[Measured], of: str) -> float:
    """Of log bias over log M, by least squares within FITTED."""
    inside = [one for one in found if FITTED[0] <= one.length <= FITTED[1]]
    lengths, biases = [one.length for one in inside], [getattr(one, of) for one in inside]
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

SAE's paper (arXiv 2601.07320) bounds its bias for segments of M tokens and a critic whose error lies under an exponential
envelope: the bound falls like 1/M. Here is why, and what it is on a chain whose values are known.

Let the critic be wrong by at most `C e^(-beta t)` at token t, as one that knows more the longer it has read. SAE's return
bootstraps from the critic only where a segment opens. Seen from the first token the k-th such place is token k M, its
weight `(1 - lam) lam^(k-1)`, so that the bias of `A + V` there is at most

    sum over k of (1 - lam) lam^(k-1) C e^(-beta k M)  =  C (1 - lam) / (e^(beta M) - lam)
                                                      <=  C (1 - lam) / (1 - lam + beta M)

GAE is M = 1, and bootstraps at every token, right away, where the critic knows least. Monte Carlo never bootstraps. A
critic that is wrong by the same C everywhere is another matter: its bias is `C (1 - lam^K)` with K boundaries ahead, and M
matters only where few are left.

The chain: {states} states, {tokens} tokens, one reward at the end, {chains} sampled chains; lam = {lam}, C = {error},
beta = {decay}, the error of a state between half of the envelope and all of it. The advantages are those of
`sae_rl.algo.td_recursion` with segments of M tokens; the bias is the difference to those with the exact critic on the same
chains. Fitted from M = {low} to {high}, the bias falls like M^{first_slope:.2f} at the first token and like
M^{mean_slope:.2f} on average over all tokens; for larger M, where the first boundary already lies behind most of the
error, it falls faster.

![bias over M](bias.svg)

| M | bias, first token | bound | bias, mean over tokens | with an exact critic | std of advantages |
|--:|--:|--:|--:|--:|--:|
{rows}

With an exact critic every M has the same expectation: where a segment opens does not depend on what was sampled here. What
longer segments cost is variance, as the last column shows.
"""


def main() -> None:
    chains = sample(NUM_CHAINS)
    found = [measure(chains, length) for length in LENGTHS]
    (HERE / "bias.md").write_text(page(found))
    plot(found, HERE / "bias.svg")


if __name__ == "__main__":
    main()
