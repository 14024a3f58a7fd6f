"""What became of each token, and which tokens are better left out.

Shape suffixes: N new rows, V base rows in use, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

# Base tokens whose rows are nearest by angle: what a person looks at first in a strange row.
NEAREST = 3
# Base rows that are compared at once.
ROWS_AT_ONCE = 2_048


@dataclass(frozen=True)
class TokenReport:
    """How one row was made.

    Attributes:
        token: The text of the token.
        snippets: How many snippets it had.
        start_error: Held-out relative squared error of the mean-of-pieces row; None if not measured.
        end_error: The same for the row that is shipped.
        norm: Its Euclidean norm.
        method: `distill`; or, where training had nothing to train on or made nothing better, the start: `mean`,
            or `piece` where the row of the last piece fits better than the mean of all.
        relative_norm: The norm as a share of the median norm of base rows.
        nearest: The base tokens with the most similar rows (ids), and their cosines.
        shown: How many snippets the token was shown until it stopped, repetitions included.
        left_out: Why the token is not shipped; None if it is.
    """

    token: str
    snippets: int
    start_error: float | None
    end_error: float | None
    norm: float
    method: str
    relative_norm: float | None = None
    nearest: tuple[tuple[int, float], ...] = ()
    shown: int = 0
    left_out: str | None = None

    @property
    def ratio(self) -> float:
        """Error as a share of the mean-of-pieces error: 1 where nothing was gained or measured."""
        return self.end_error / self.start_error if self.start_error and self.end_error is not None else 1.0


def left_out_reasons(
    errors: Sequence[tuple[float, float] | None], leave_out: float, parts: Sequence[Sequence[int]] = ()
) -> list[str | None]:
    """Find the tokens that the model cannot represent as one row.

    The rule: a token is left out if its held-out error is more than `leave_out` times the median error of all
    tokens, and training took away less than half of what the mean of its pieces had. The first says that texts
    with it are read worse than texts with the others, the second that more training would not help much. A token
    from which one that stays is merged stays, too: without it, text would have to be searched for the other.

    Args:
        errors: For each token its held-out errors (start, end); None where there was nothing to judge by.
        leave_out: The factor; 0 leaves nothing out.
        parts: For each token the indices of those that it is merged from.

    Returns:
        For each token why it is left out, or None. A token without errors stays: nothing is known against it.
    """
    known = [pair[1] for pair in errors if pair is not None]
    if not known or not leave_out:
        return [None] * len(errors)
    bound = leave_out * median(known)
    reasons = [_reason(pair, bound) for pair in errors]
    needing = [i for i, reason in enumerate(reasons) if reason is None]
    while needing and parts:
        for part in parts[needing.pop()]:
            if reasons[part] is not None:
                reasons[part] = None
                needing.append(part)
    return reasons


def _reason(pair: tuple[float, float] | None, bound: float) -> str | None:
    if pair is None or pair[1] <= bound or pair[1] <= pair[0] / 2:
        return None
    return f"error {pair[1]:.3f} is above {bound:.3f}, and {pair[1] / max(pair[0], 1e-12):.0%} of the mean's"


@torch.no_grad()
def nearest_rows(
    rows_ND: torch.Tensor, base_VD: torch.Tensor, usable_V: torch.Tensor | None = None
) -> list[tuple[tuple[int, float], ...]]:
    """Return for each row the ids of the base rows with the largest cosines, and these.

    Args:
        rows_ND: The rows.
        base_VD: The base's.
        usable_V: Which of these are looked at; None for all.
    """
    unit_ND = torch.nn.functional.normalize(rows_ND.to(base_VD.device).float(), dim=1)
    best_NK = unit_ND.new_empty(len(unit_ND), 0)
    ids_NK = torch.empty(len(unit_ND), 0, dtype=torch.long, device=base_VD.device)
    every = torch.arange(len(base_VD)) if usable_V is None else usable_V.nonzero().flatten()
    for at in every.to(base_VD.device).split(ROWS_AT_ONCE):
        cosine_NC = unit_ND @ torch.nn.functional.normalize(base_VD[at].float(), dim=1).T
        both = torch.cat((best_NK, cosine_NC), 1)
        best_NK, column_NK = both.topk(min(NEAREST, both.shape[1]), dim=1)
        ids_NK = torch.cat((ids_NK, at.expand(len(unit_ND), -1)), 1).gather(1, column_NK)
    return [tuple(zip(ids, cosines, strict=True))
            for ids, cosines in zip(ids_NK.tolist(), best_NK.tolist(), strict=True)]
