"""The fit of output rows on frozen hidden states: one softmax over all new tokens and "none of them".

Shape suffixes: P places, N new tokens, D hidden size, I places of one step.

At each place the base has already decided what it would write. The rows see the same final hidden state as the
base's own rows, and are trained to be on top exactly where the base goes on to write their whole run. Nothing of
the base changes, so it enters as a constant: the logit of its best token there. That leaves a softmax regression,
which is convex; all tokens are normalised together, so that they do not claim the same place twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vocabext.model.logit_map import LogitMap
from vocabext.model.places import Places

# Places per step, fewer where there are few, and the step size in units of whitened states.
BATCH, LEAST_BATCH, LEAST_STEPS = 4_096, 128, 40
RATE = 0.02
# States from which the scale of each direction is measured, and what is added to it, relative to the mean.
SAMPLE = 60_000
RIDGE = 1e-4
# Weight of the squared rows, in units of whitened states: only there so that rare tokens stay finite.
DECAY = 1e-6


@dataclass(frozen=True)
class Targets:
    """What rows are fitted to.

    Attributes:
        places: The places.
        label_P: The new token that should be written there; N for none.
        logit_map: From products to logits, as the model class does it.
    """

    places: Places
    label_P: torch.Tensor
    logit_map: LogitMap

    def scores(self, rows_ND: torch.Tensor, at: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Return the logits of rows at some places, (I, N), float32."""
        return self.logit_map(self.places.hidden_PD[at].to(rows_ND.device).float() @ rows_ND.T)


def longest_runs(places: Places, lengths_N: torch.Tensor) -> torch.Tensor:
    """Return for each place the token with the longest run that greedy decoding writes there, N for none."""
    label_P = torch.full((len(places),), len(lengths_N))
    token_R, place_R = places.token_R[places.greedy_R], places.place_R[places.greedy_R]
    order = torch.argsort(lengths_N[token_R], stable=True)  # the longest comes last, and stays
    for length in lengths_N.unique().tolist():  # an indexed assignment does not promise an order
        some = order[lengths_N[token_R[order]] == length]
        label_P[place_R[some]] = token_R[some]
    return label_P


class OutputFit:
    """Rows under way: they can be trained on with other weights from where they are."""

    def __init__(self, targets: Targets, num_tokens: int, device: torch.device, seed: int = 0) -> None:
        """Whiten the states; rows begin at zero, where they are never on top.

        Args:
            targets: What to fit to.
            num_tokens: How many rows (N).
            device: Where to compute.
            seed: Of the order of places.
        """
        self.targets, self.device = targets, device
        self.generator = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(targets.places), generator=self.generator)[:SAMPLE]
        width = targets.places.hidden_PD.shape[1]
        second_DD = torch.zeros(width, width, dtype=torch.float32)
        for at in some.split(BATCH):  # all of them in float32 would be more than the states
            part_ID = targets.places.hidden_PD[at].float()
            second_DD += part_ID.T @ part_ID / len(some)
        second_DD *= targets.logit_map.scale**2  # so that a step moves logits by as much in a class that scales them
        second_DD += RIDGE * second_DD.diagonal().mean() * torch.eye(width, dtype=torch.float32)
        self.factor_DD = torch.linalg.cholesky(second_DD).to(device)
        self.white_ND = torch.zeros(num_tokens, width, dtype=torch.float32, device=device)

    @property
    def rows_ND(self) -> torch.Tensor:  # noqa: N802
        """The rows, float32."""
        return self.unwhitened(self.white_ND)

    def unwhitened(self, white_ND: torch.Tensor) -> torch.Tensor:
        """Return rows as the model multiplies with them."""
        return torch.linalg.solve_triangular(self.factor_DD, white_ND, upper=False, left=False)

    def train(self, epochs: float, caution: float, note: Callable[[], None] = lambda: None) -> None:
        """Go over the places so many times.

        Args:
            epochs: How often.
            caution: Weight of places where no new token should be written, against those where one should.
            note: Called after each step.
        """
        white_ND = self.white_ND.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([white_ND], lr=RATE)
        for share, at in self._batches(epochs):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - share)
            loss = self._loss(white_ND, at, caution) + DECAY * white_ND.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            note()
        self.white_ND = white_ND.detach()

    def steps(self, epochs: float) -> int:
        """Return how many steps `train` makes."""
        return max(1, round(epochs * len(self.targets.places) / self._batch))

    @property
    def _batch(self) -> int:
        return min(BATCH, max(LEAST_BATCH, len(self.targets.places) // LEAST_STEPS))

    def _batches(self, epochs: float) -> "list[tuple[float, torch.Tensor]]":
        size, steps, batch = len(self.targets.places), self.steps(epochs), self._batch
        order = torch.cat([torch.randperm(size, generator=self.generator)
                           for _ in range(-(-steps * batch // size))])
        return [(step / steps, order[step * batch : (step + 1) * batch]) for step in range(steps)]

    def _loss(self, white_ND: torch.Tensor, at: torch.Tensor, caution: float) -> torch.Tensor:
        scores_IN = self.targets.scores(self.unwhitened(white_ND), at)
        base_I = self.targets.places.top_P[at].to(scores_IN.device)
        label_I = self.targets.label_P[at].to(scores_IN.device)
        every = torch.cat((scores_IN, base_I[:, None]), 1)
        loss_I = torch.nn.functional.cross_entropy(every, label_I, reduction="none")
        return (loss_I * torch.where(label_I < len(white_ND), 1.0, caution)).mean()
