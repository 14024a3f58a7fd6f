"""How rows write, at places of which it is known what the base writes there.

Shape suffixes: P places, N new tokens, C places looked at together, D hidden size.
"""

from dataclasses import asdict, dataclass

import torch

from vocabext.model.logit_map import LogitMap
from vocabext.model.places import Places

AT_ONCE = 8_192


@dataclass(frozen=True)
class Uses:
    """Which new token is on top at each place, and whether base would have written its run.

    Attributes:
        token_P: The new token with the highest logit.
        ahead_P: How far it is ahead of the best base token; below 0 the base token is on top.
        right_P: Whether base's own greedy continuation writes the whole run.
        deserved_P: Whether it writes the whole run of any new token.
        lost_P: Nats by which all new tokens together lower the log probability of every base token.
    """

    token_P: torch.Tensor
    ahead_P: torch.Tensor
    right_P: torch.Tensor
    deserved_P: torch.Tensor
    lost_P: torch.Tensor

    @property
    def on_top_P(self) -> torch.Tensor:  # noqa: N802
        """Where a new token is written."""
        return self.ahead_P > 0


@dataclass(frozen=True)
class Writing:
    """How well new tokens are written.

    Attributes:
        places: Places that were looked at.
        deserved: Those where base's own greedy continuation writes the run of a new token.
        adoption: Share of the deserved places where such a token is on top.
        false_use: Share of all places where a new token is on top and base writes something else.
        nll_rise_nats: How much the base's targets lose at places that are not deserved, on average.
        nll_rise_everywhere_nats: The same at all places, where the text has the pieces of the run.
        adopted_pieces: Pieces of base's continuations that adopted tokens stand for, one token counting one less.
        adoptable_pieces: The same if every deserved place had its longest token.
    """

    places: int
    deserved: int
    adoption: float | None
    false_use: float
    nll_rise_nats: float
    nll_rise_everywhere_nats: float
    adopted_pieces: int
    adoptable_pieces: int

    def to_json(self) -> dict[str, object]:
        """Return JSON-ready values."""
        return asdict(self)


@torch.no_grad()
def find_uses(
    places: Places, rows_ND: torch.Tensor, logit_map: LogitMap, bias_N: torch.Tensor | None = None
) -> Uses:
    """Compare rows with the base's logits at every place.

    Args:
        places: The places.
        rows_ND: Output rows of the new tokens.
        logit_map: From products to logits, as the model class does it.
        bias_N: Entries of the head's bias for the new tokens; None for a head without one.
    """
    num_new = len(rows_ND)
    added_N = torch.zeros((), dtype=torch.float32) if bias_N is None else bias_N.float()
    greedy = torch.unique(places.place_R[places.greedy_R] * num_new + places.token_R[places.greedy_R])
    deserved_P = torch.zeros(len(places), dtype=torch.bool)
    deserved_P[places.place_R[places.greedy_R]] = True
    tokens, ahead, lost = [], [], []
    for at in torch.arange(len(places)).split(AT_ONCE):
        logits_CN = places.hidden_PD[at].to(rows_ND.device).float() @ rows_ND.float().T
        logits_CN = logit_map(logits_CN.add_(added_N.to(rows_ND.device))).cpu()
        best_C, token_C = logits_CN.max(1)
        tokens.append(token_C)
        ahead.append(best_C - places.top_P[at])
        lost.append(torch.nn.functional.softplus(torch.logsumexp(logits_CN, 1) - places.normaliser_P[at]))
    token_P = torch.cat(tokens)
    right_P = torch.isin(torch.arange(len(places)) * num_new + token_P, greedy)
    return Uses(token_P, torch.cat(ahead), right_P, deserved_P, torch.cat(lost))


def measure_writing(places: Places, uses: Uses, lengths_N: torch.Tensor) -> Writing:
    """Sum up uses.

    Args:
        places: The places.
        uses: What rows do there.
        lengths_N: Length of each run.
    """
    right_P = uses.on_top_P & uses.right_P
    wrong_P = uses.on_top_P & ~uses.right_P
    deserved = int(uses.deserved_P.sum())
    saved_P = torch.zeros(len(places), dtype=torch.long)
    saved_P.scatter_reduce_(0, places.place_R[places.greedy_R], lengths_N[places.token_R[places.greedy_R]] - 1, "amax")
    others_P = ~uses.deserved_P
    return Writing(
        len(places), deserved, int(right_P.sum()) / deserved if deserved else None,
        int(wrong_P.sum()) / max(1, len(places)),
        float(uses.lost_P[others_P].mean()) if bool(others_P.any()) else 0.0,
        float(uses.lost_P.mean()) if len(places) else 0.0,
        int((lengths_N[uses.token_P[right_P]] - 1).sum()), int(saved_P.sum()),
    )


def per_token(uses: Uses, num_new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each token how often it is rightly and wrongly on top, (N,) each."""
    right, wrong = (uses.token_P[uses.on_top_P & (uses.right_P == value)] for value in (True, False))
    return torch.bincount(right, minlength=num_new), torch.bincount(wrong, minlength=num_new)
