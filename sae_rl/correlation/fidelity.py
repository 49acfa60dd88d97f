"""What an update uses: the policy gradient that advantages give, against that of unbiased reference advantages.

G   prompts                     E   estimators
D   numbers of a gradient       R   resamples of prompts; row 0 of R + 1 is the sample itself
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Squared lengths of mean gradients, estimated without bias, of the sample and of its resamples.

    x_g is the gradient of the responses to prompt g. Only products of different prompts enter ``length``, ``along`` and
    ``true_length``, so that noise does not enter squares. Where noise is large they may therefore be negative: what needs
    their root or their quotient is then NaN. Nothing is clamped, so a cosine may exceed 1.
    """

    length: Tensor  # (R + 1, E) |mu|^2, mu = E[x_g]
    along: Tensor  # (R + 1, E) mu . mu_ref
    true_length: Tensor  # (R + 1, 1) |mu_ref|^2
    spread: Tensor  # (R + 1, E) E|x_g - mu|^2, the variance of the gradient of one prompt

    @staticmethod
    def of(gradients: Tensor, counts: Tensor) -> Fidelity:
        """Measures the gradients of each estimator.

        With w_g how often a resample has prompt g, and g != h:

            mu_a . mu_b = sum_gh w_g w_h x_ag . x_bh / sum_gh w_g w_h        (a U-statistic)
            spread      = sum_g w_g |x_g|^2 / sum_g w_g - |mu|^2

        A prompt is not paired with its own copy in a resample, since that product would hold the noise again.

        Args:
            gradients: (E + 1, G, D), the last for the reference.
            counts: (R + 1, G) of `resampled_counts`.
        """
        reference = gradients[-1].double()
        rows = [_products(one.double(), reference, counts) for one in gradients]
        length, along, squares = (torch.stack(column, 1) for column in zip(*rows, strict=True))
        return Fidelity(
            length=length[:, :-1],
            along=along[:, :-1],
            true_length=length[:, -1:],
            spread=(squares - length)[:, :-1],
        )

    @property
    def cosine(self) -> Tensor:
        """(R + 1, E) ``mu . mu_ref / (|mu| |mu_ref|)``, that of a batch without end."""
        return self.along / (self.length.sqrt() * self.true_length.sqrt())

    @property
    def scale(self) -> Tensor:
        """(R + 1, E) ``s = mu . mu_ref / |mu|^2``, by which the mean gradient comes nearest to the reference's."""
        return self.along / torch.where(self.length > 0, self.length, torch.nan)

    @property
    def squared_bias(self) -> Tensor:
        """(R + 1, E) ``|mu_ref - s mu|^2 / |mu_ref|^2 = 1 - cosine^2``, what no batch and no step size removes."""
        return 1 - self.cosine**2

    @property
    def variance(self) -> Tensor:
        """(R + 1, E) ``s^2 spread / |mu_ref|^2``, for one prompt; that of n prompts is an n-th of it."""
        return self.scale**2 * self.spread / torch.where(self.true_length > 0, self.true_length, torch.nan)

    def squared_error(self, n: int) -> Tensor:
        """(R + 1, E) ``E|s x - mu_ref|^2 / |mu_ref|^2 = squared_bias + variance / n``, x the mean gradient of n prompts."""
        return self.squared_bias + self.variance / n

    def norm(self, n: int) -> Tensor:
        """(R + 1, E) ``sqrt(E|x|^2) = sqrt(|mu|^2 + spread / n)``, x the mean gradient of n prompts."""
        return (self.length + self.spread / n).sqrt()

    def expected_cosine(self, n: int) -> Tensor:
        """(R + 1, E) ``mu . mu_ref / (|mu_ref| sqrt(E|x|^2))``, x the mean gradient of n prompts.

        The root of the mean square stands for the mean length; the two differ little in many dimensions. The best scale for a
        batch of n prompts leaves exactly ``1 - expected_cosine^2`` of |mu_ref|^2 as mean squared error.
        """
        return self.along / (self.true_length.sqrt() * self.norm(n))

    def worth(self, n: int, baseline: int) -> Tensor:
        """(R + 1, E) m / n, where m prompts of estimator ``baseline`` have the expected cosine of n prompts of each.

        Both have the same responses to a prompt, so this is how many responses of the baseline one response is worth, by the
        cosine and by the mean squared error at the best scale for the batch:

            m = spread_b / (along_b^2 (|mu|^2 + spread / n) / along^2 - |mu_b|^2)

        |mu_ref| cancels. While noise exceeds the signal, so that spread / n is large, |mu|^2 and |mu_b|^2 hardly matter, and
        the worth is the quotient of ``along^2 / spread``: squared signal along the reference over noise. NaN where a gradient
        points away from the reference, or where no number of the baseline's prompts reaches the cosine.
        """
        facing = torch.where(self.along > 0, self.along, torch.nan)
        b = slice(baseline, baseline + 1)
        left = (facing[:, b] / facing) ** 2 * (self.length + self.spread / n) - self.length[:, b]
        return self.spread[:, b] / torch.where(left > 0, left, torch.nan) / n


def _products(one: Tensor, reference: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R + 1,) each: |mu|^2, mu . mu_ref, and the mean of |x_g|^2."""
    pairs = counts.sum(1) ** 2 - counts.square().sum(1)

    def between(other: Tensor) -> Tensor:
        products = (one @ other.T).fill_diagonal_(0.0)
        return ((counts @ products) * counts).sum(1) / pairs

    return between(one), between(reference), counts @ one.square().sum(1) / counts.sum(1)
