"""Two optimizers: Muon for the matrices, AdamW for the rest.

**AdamW** divides the running mean of the gradient by the root of its running square, coordinate
by coordinate.  It trains the embedding (which is the output head too) and the norms.

**Muon** treats a weight matrix as a matrix.  It takes the momentum of the gradient, written as
``U S V^T``, and replaces it by ``U V^T``: every direction that the gradient has is stepped along
equally far, not only the few strong ones.  The singular value decomposition is never computed; a
few iterations of a polynomial in ``X X^T`` push all singular values towards one
(Newton-Schulz), and these are plain matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd polynomial a x + b x^3 + c x^5, steep at zero and flat around one."""


def orthogonalize(matrices_KMN: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices towards one.

    Args:
        matrices_KMN: K matrices of M by N.
        steps: Iterations of the polynomial.

    Returns:
        Matrices of the same shape with singular values around one.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices_KMN
    if tall := x.size(-2) > x.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_KMM = x @ x.mT
        x = a * x + (b * gram_KMM + c * gram_KMM @ gram_KMM) @ x
    result_KMN: Tensor = x.mT if tall else x
    return result_KMN


class Optimizer:
    """Updates a model from its gradients.

    Matrices inside the layers go to Muon, grouped by shape so that each group is one batch of
    matrix products; embeddings and norms go to AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        muon_rate: float,
        adam_rate: float,
        decay: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        """Sort the parameters.

        Args:
            model: The model, in float32.
            muon_rate: Peak learning rate of the matrices.
            adam_rate: Peak learning rate of the embedding and the norms.
            decay: Weight decay of the matrices and the embedding, per unit of learning rate.
            momentum: Of Muon.
            betas: Of AdamW.
        """
        self.muon_rate, self.adam_rate, self.decay = muon_rate, adam_rate, decay
        self.momentum, self.betas = momentum, betas
        self.step_count = 0
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.adam = [p for name, p in named if p.ndim != 2 or "embed" in name]
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for name, p in named:
            if p.ndim == 2 and "embed" not in name:
                shapes.setdefault(p.shape, []).append(p)
        self.muon = list(shapes.values())
        self.parameters = [p for _, p in named]
        self.means = [torch.zeros_like(p) for p in self.adam]
        self.squares = [torch.zeros_like(p) for p in self.adam]
        self.momenta = [torch.zeros(len(ps), *ps[0].shape) for ps in self.muon]

    @torch.no_grad()
    def step(self, factor: float, clip: float = 1.0) -> float:
        """Update all parameters from their gradients and clear those.

        Args:
            factor: Learning rate as a fraction of the peak.
            clip: Largest norm of the whole gradient.

        Returns:
            The gradient's norm before clipping.
        """
        self.step_count += 1
        norm = float(nn.utils.clip_grad_norm_(self.parameters, clip))
        self._adam_step(factor * self.adam_rate)
        self._muon_step(factor * self.muon_rate)
        for p in self.parameters:
            p.grad = None
        return norm

    def _adam_step(self, rate: float) -> None:
        """Step along the normalised running mean of the gradient."""
        beta1, beta2 = self.betas
        correction1 = 1 - beta1**self.step_count
        correction2 = 1 - beta2**self.step_count
        for p, mean, square in zip(self.adam, self.means, self.squares, strict=True):
            assert p.grad is not None
            mean.lerp_(p.grad, 1 - beta1)
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            if p.ndim == 2:
                p.mul_(1 - rate * self.decay)
            scale = (square / correction2).sqrt_().add_(1e-8)
            p.addcdiv_(mean, scale, value=-rate / correction1)

    def _muon_step(self, rate: float) -> None:
        """Step along the orthogonalised momentum, longer for tall matrices."""
        for ps, momentum_KMN in zip(self.muon, self.momenta, strict=True):
            gradient_KMN = torch.stack([p.grad for p in ps if p.grad is not None])
            momentum_KMN.lerp_(gradient_KMN, 1 - self.momentum)
            update_KMN = orthogonalize(gradient_KMN.lerp(momentum_KMN, self.momentum))
            stretch = max(1.0, ps[0].shape[0] / ps[0].shape[1]) ** 0.5
            for p, update_MN in zip(ps, update_KMN, strict=True):
                p.mul_(1 - rate * self.decay).add_(update_MN, alpha=-rate * stretch)
