"""An optimizer per token: Adam whose clock, momenta and end belong to one row.

Shape suffixes: G tokens of a group, A tokens still at work, D hidden size.

Tokens are independent problems that share forward passes. A dense Adam over a matrix keeps moving rows
that are absent from a batch; here a row moves only in its own steps.

A token works in rounds. Each round raises its step size to the peak and lets it decay to zero, so that
every round ends with a finished row: stopping early costs nothing. After a round the held-out snippets
decide. From the second round on, a round that lowered their error by less than `MIN_GAIN` of the best so far is
the token's last.
"""

import math

import torch

BETAS = (0.9, 0.95)
MIN_GAIN = 0.02
# The first round is short: from a good start it may gain nothing, and a longer one still will.
MIN_ROUNDS = 2


class Clocks:
    """The rows of a group while they are being trained.

    Attributes:
        rows_GD: The rows as they are now, float32.
        best_GD: The rows with the lowest held-out error so far.
        best_error_G: That error.
        active_G: Which tokens are still at work.
        steps_G: How many steps each token has taken.
    """

    def __init__(self, start_GD: torch.Tensor, start_error_G: torch.Tensor) -> None:
        """Begin at the start rows and their held-out error."""
        self.rows_GD, self.best_GD, self.best_error_G = start_GD.clone(), start_GD.clone(), start_error_G.clone()
        self.active_G = torch.ones(len(start_GD), dtype=torch.bool, device=start_GD.device)
        self.steps_G = torch.zeros(len(start_GD), device=start_GD.device)
        self._first_GD, self._second_GD = torch.zeros_like(start_GD), torch.zeros_like(start_GD)
        self._rounds_G = torch.zeros(len(start_GD), dtype=torch.long, device=start_GD.device)

    @property
    def active(self) -> torch.Tensor:
        """The tokens still at work, (A,)."""
        return self.active_G.nonzero().flatten()

    def begin_elsewhere(self, other_GD: torch.Tensor, error_G: torch.Tensor) -> None:
        """Move the tokens that other start rows fit better to these, before the first step."""
        better_G = error_G < self.best_error_G
        self.rows_GD[better_G] = other_GD[better_G]
        self.best_GD[better_G] = other_GD[better_G]
        self.best_error_G[better_G] = error_G[better_G]

    def step(self, at: torch.Tensor, gradient_AD: torch.Tensor, rate: float) -> None:
        """Take one Adam step (arXiv 1412.6980) with the rows of some tokens, without weight decay."""
        self.steps_G[at] += 1
        first_AD = self._first_GD[at].lerp_(gradient_AD, 1 - BETAS[0])
        second_AD = self._second_GD[at].lerp_(gradient_AD.square(), 1 - BETAS[1])
        self._first_GD[at], self._second_GD[at] = first_AD, second_AD
        first_bias_A1, second_bias_A1 = (1 - beta ** self.steps_G[at, None] for beta in BETAS)
        scale_AD = (second_AD / second_bias_A1).sqrt_().add_(1e-12)
        self.rows_GD[at] -= rate * first_AD / first_bias_A1 / scale_AD

    def end_round(self, at: torch.Tensor, error_A: torch.Tensor) -> None:
        """Keep what became better, and stop the tokens that gained too little.

        Args:
            at: The tokens that took part.
            error_A: Their held-out error now.
        """
        error_A = error_A.masked_fill(~self.rows_GD[at].isfinite().all(1), math.inf).nan_to_num(nan=math.inf)
        before_A = self.best_error_G[at]
        better = at[error_A < before_A]
        self.best_GD[better] = self.rows_GD[better]
        self.best_error_G[better] = error_A[error_A < before_A]
        self._rounds_G[at] += 1
        self.active_G[at] = (error_A < before_A * (1 - MIN_GAIN)) | (self._rounds_G[at] < MIN_ROUNDS)
        # Whoever goes on goes on from the best row, and the momentum of the last round is not its own.
        self.rows_GD[at] = self.best_GD[at]
        self._first_GD[at] = 0.0
        self._second_GD[at] = 0.0
        self.steps_G[at] = 0


def decayed(rate: float, step: int, steps: int) -> float:
    """Return the step size at a step of a round: a cosine from the peak to nearly zero."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
