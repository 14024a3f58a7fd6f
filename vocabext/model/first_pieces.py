"""The distribution over what comes next in pieces, of a model that also writes new tokens.

Shape suffixes: P places, V base ids, N new tokens.
"""

import torch


def first_piece_logs(logits_PU: torch.Tensor, first_N: torch.Tensor) -> torch.Tensor:
    """Return the log probability that each base id comes next, by itself or as the first piece of a new token.

    Args:
        logits_PU: Logits of the base ids and, behind them, of the new tokens, (P, V + N).
        first_N: The first piece of each new token.

    Returns:
        Log probabilities, (P, V).
    """
    logs_PU = torch.log_softmax(logits_PU, dim=1)
    num_base = logits_PU.shape[1] - len(first_N)
    pieces, group_N = torch.unique(first_N.to(logits_PU.device), return_inverse=True)
    new_PF = torch.zeros(len(logs_PU), len(pieces), dtype=logs_PU.dtype, device=logs_PU.device)
    new_PF.index_add_(1, group_N, logs_PU[:, num_base:].exp())
    found_PV = logs_PU[:, :num_base].clone()
    found_PV[:, pieces] = torch.logaddexp(found_PV[:, pieces], new_PF.log())
    return found_PV
