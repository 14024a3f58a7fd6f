"""The start of every new row."""

from collections.abc import Sequence

import torch

from vocabext.records import NewToken


def mean_rows(matrix_VD: torch.Tensor, tokens: Sequence[NewToken]) -> torch.Tensor:
    """Return the mean of each token's pieces, (N, D), float32: the usual baseline, and our start.

    Args:
        matrix_VD: Embedding or head of the base model.
        tokens: The new tokens.
    """
    return torch.stack([matrix_VD[list(t.run)].float().mean(0) for t in tokens])
