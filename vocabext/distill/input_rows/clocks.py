"""An optimizer per token: steps whose clock, momentum and end belong to one row.

Shape suffixes: G tokens of a group, A tokens still at work, D hidden size.

Tokens are independent problems that share forward passes. A dense optimizer over a matrix keeps moving rows
that are absent from a batch; here a row moves only in its own steps.

What the rows do share is the space they live in, and it is far from round: the model is very sensitive in some
directions and hardly in most, and in the same ones for every row. So the directions are learned from the gradients
of all tokens together: a step is taken along C^-1/2 g, with C the mean of g g' over the unit
gradients seen so far (full-matrix AdaGrad, Duchi et al. 2011, with one matrix for all rows), and its length is the
step size, whatever the gradient's. A token sees a few dozen gradients; Adam, which must learn the scale of each
element from these alone, needs several times as many for the same error (docs/decisions/distillation.md).

A token works in rounds. Each round raises its step size to the peak and lets it decay to zero, so that
every round ends with a finished row: stopping early costs nothing. After a round the held-out snippets
decide. From the second round on, a round that lowered their error by less than `MIN_GAIN` of the best so far is
the token's last. A token without held-out snippets has `MIN_ROUNDS`, and the row that these made.
"""

import math

import torch

# Little, as a round is short: with 0.9 a row is carried past its goal for ten steps.
MOMENTUM = 0.3
# What C gets of the unit matrix, in units of its mean eigenvalue: few gradients leave most directions unseen.
DAMPING = 0.1
MIN_GAIN = 0.02
# The first round is short: from a good start it may gain nothing, and a longer one still will.
MIN_ROUNDS = 2


class Directions:
    """How sensitive a model is in which direction: C, and its inverse square root.

    The root is taken anew whenever twice as many steps have been seen: for a model of width 4,096 it costs as much
    as many a step.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Begin with no direction preferred."""
        self._sum_DD = torch.zeros(width, width, dtype=dtype, device=device)
        self._root_DD = torch.eye(width, dtype=dtype, device=device)
        self._steps, self._next = 0, 1

    def see(self, gradient_AD: torch.Tensor) -> None:
        """Learn from the gradients of one step."""
        unit_AD = torch.nn.functional.normalize(gradient_AD, eps=1e-30)
        self._sum_DD += unit_AD.T @ unit_AD
        self._steps += 1
        if self._steps >= self._next and bool(self._sum_DD.any()):
            values_D, vectors_DD = torch.linalg.eigh(self._sum_DD)
            damped_D = values_D.clamp(min=0) + DAMPING * values_D.mean()
            self._root_DD = (vectors_DD * damped_D.rsqrt()) @ vectors_DD.T
            self._next = 2 * self._steps

    def step(self, gradient_AD: torch.Tensor) -> torch.Tensor:
        """Return C^-1/2 g for each row, with elements of mean square 1."""
        turned_AD = torch.nn.functional.normalize(gradient_AD @ self._root_DD, eps=1e-30)
        return turned_AD * math.sqrt(gradient_AD.shape[1])


class Clocks:
    """The rows of a group while they are being trained.

    Attributes:
        rows_GD: The rows as they are now, float32.
        best_GD: The rows with the lowest held-out error so far.
        best_error_G: That error.
        active_G: Which tokens are still at work.
    """

    def __init__(self, start_GD: torch.Tensor, start_error_G: torch.Tensor) -> None:
        """Begin at the start rows and their held-out error."""
        self.rows_GD, self.best_GD, self.best_error_G = start_GD.clone(), start_GD.clone(), start_error_G.clone()
        self.active_G = torch.ones(len(start_GD), dtype=torch.bool, device=start_GD.device)
        self._momentum_GD = torch.zeros_like(start_GD)
        self._directions = Directions(start_GD.shape[1], start_GD.dtype, start_GD.device)
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
        """Take one step with the rows of some tokens.

        Args:
            at: The tokens, (A,).
            gradient_AD: Their gradients. A row whose gradient is no number becomes one that is none, and teaches
                the others nothing.
            rate: Root mean square of the elements of the step.
        """
        self._directions.see(gradient_AD[gradient_AD.isfinite().all(1)])
        momentum_AD = self._momentum_GD[at].lerp_(gradient_AD, 1 - MOMENTUM)
        self._momentum_GD[at] = momentum_AD
        self.rows_GD[at] -= rate * self._directions.step(momentum_AD)

    def end_round(self, at: torch.Tensor, error_A: torch.Tensor) -> None:
        """Keep what became better, and stop the tokens that gained too little.

        Args:
            at: The tokens that took part.
            error_A: Their held-out error now; infinite for tokens that nothing judges.
        """
        finite_A, before_A = self.rows_GD[at].isfinite().all(1), self.best_error_G[at]
        error_A = error_A.masked_fill(~finite_A, math.inf).nan_to_num(nan=math.inf, posinf=math.inf)
        better_A = (error_A < before_A) | (before_A.isposinf() & finite_A)  # infinite where nothing judges
        self.best_GD[at[better_A]] = self.rows_GD[at[better_A]]
        self.best_error_G[at[better_A]] = error_A[better_A]
        self._rounds_G[at] += 1
        self.active_G[at] = (error_A < before_A * (1 - MIN_GAIN)) | (self._rounds_G[at] < MIN_ROUNDS)
        # Whoever goes on goes on from the best row, and the momentum of the last round is not its own.
        self.rows_GD[at] = self.best_GD[at]
        self._momentum_GD[at] = 0.0


def decayed(rate: float, step: int, steps: int) -> float:
    """Return the step size at a step of a round: straight from the peak to nearly zero."""
    return rate * (1 - step / steps)
