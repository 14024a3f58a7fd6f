"""What a model class makes of the products of states and output rows before it calls them logits.

Most classes leave them as they are. Granite divides them, Cohere multiplies them, Gemma 2 bounds them. New output rows
are multiplied apart from the model, so they need the same: it is measured on the class itself, not read from config
keys, of which every family has its own.
"""

from dataclasses import dataclass
from typing import Any

import torch

# Products that the class is given to see what it makes of them; float16 holds them, and each has few digits.
SMALL, LARGE = 2.0**-10, 2.0**14
BETWEEN = (-64.0, -1.0, 4.0, 32.0)
ROUNDING = 0.01
UNSCALED = 1e-5


@dataclass(frozen=True)
class LogitMap:
    """From products to logits: multiplied, then bounded.

    Attributes:
        scale: The factor.
        cap: Bound of the logits; None for no bound.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Return the logits, in the dtype of the products."""
        logits = products if self.scale == 1.0 else products * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@torch.no_grad()
def measure_logit_map(model: Any, ids_BT: torch.Tensor) -> LogitMap | None:
    """Give a class products of our choice in place of those of its head, and look at the logits.

    Args:
        model: A causal language model of transformers.
        ids_BT: Some text; its length is no matter.

    Returns:
        The map, or None if it has another form, or the class does not call its head.
    """
    products = (SMALL, *BETWEEN, LARGE)
    called = []

    def replace(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        called.append(True)
        steps = torch.arange(output.shape[-2], device=output.device) % len(products)
        return torch.tensor(products, device=output.device)[steps][:, None].expand(output.shape)

    hook = model.get_output_embeddings().register_forward_hook(replace)
    try:
        text = ids_BT[:1].repeat(1, len(products))[:, : len(products)]
        logits = model(input_ids=text, use_cache=False).logits[0, :, 0].float().tolist()
    finally:
        hook.remove()
    scale = logits[0] / SMALL
    scale = 1.0 if abs(scale - 1.0) < UNSCALED else scale
    linear = abs(logits[-1] - scale * LARGE) <= ROUNDING * abs(logits[-1])
    found = LogitMap(scale, None if linear else abs(logits[-1]))
    expected = found(torch.tensor(products, dtype=torch.float64)).tolist()
    close = all(abs(one - other) <= ROUNDING * abs(other) for one, other in zip(logits, expected, strict=True))
    return found if called and close else None
