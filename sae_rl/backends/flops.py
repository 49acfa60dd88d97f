"""What a pass of a dense transformer costs in floating-point operations, counted from its matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

HEADS = ("lm_head", "value_head")
BACKWARD = 2  # times the forward pass: gradients of inputs, and of weights


@dataclass(frozen=True, slots=True)
class PassCost:
    """A token takes 2 operations per parameter of a matrix, and causal attention over T tokens ``2 T^2`` per layer and width.

    Softmax, norms and embeddings are left out, as is usual for model FLOPs (arXiv 2204.02311, appendix B).
    """

    token_parameters: int  # of the matrices that every token goes through
    state_parameters: int  # of the head, for the states of sampled tokens alone
    attention_width: int  # heads x size of a head, over all layers

    @classmethod
    def of(cls, network: nn.Module) -> PassCost:
        matrices = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        sizes = {name: matrix.in_features * matrix.out_features for name, matrix in matrices.items()}
        heads = sum(size for name, size in sizes.items() if name.rpartition(".")[2] in HEADS)
        width = sum(matrix.in_features for name, matrix in matrices.items() if "o_proj" in name.split(".")[-2:])
        return cls(sum(sizes.values()) - heads, heads, width)

    @property
    def attention_tokens(self) -> float:
        """The length at which attention costs as much as the matrices."""
        return self.token_parameters / self.attention_width if self.attention_width else math.inf

    def forward(self, lengths: Sequence[int], num_states: int) -> float:
        """Operations of one pass over sequences of these lengths that answers for ``num_states`` states."""
        tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
        return 2.0 * (
            self.token_parameters * tokens + self.state_parameters * num_states + self.attention_width * pairs
        )
