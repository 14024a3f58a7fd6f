"""Keep the rows of a tied model from being written where the base would write something else.

Shape suffixes: P places, D hidden size, G tokens of a group, W texts, U positions of them.

Where input and output matrix are one, a new input row is an output row as well. Nothing in the
objective bounds its product with final hidden states, and a few loud rows are then on top nearly
everywhere: the model reads well and writes nonsense. So the probability that a row would take at places
sampled from the corpus, next to all base tokens, is part of what is minimised.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vocabext.distill.input_rows.examples import Examples
from vocabext.model.frozen import FrozenModel
from vocabext.model.logit_map import LogitMap

# Places looked at in each step, out of those kept.
PLACES_PER_STEP = 512
MAX_PLACES = 2_048  # each costs the whole output head once
NORMALISER_NUMBERS = 2**23  # logits that are there at once


@dataclass(frozen=True)
class Background:
    """Places at which the base predicts.

    Attributes:
        hidden_PD: Final hidden states.
        normaliser_P: Log of the sum over base tokens of the exponentials of their logits.
        logit_map: From products to logits, as the model class does it.
    """

    hidden_PD: torch.Tensor
    normaliser_P: torch.Tensor
    logit_map: LogitMap

    def sample(self, generator: torch.Generator) -> "Background":
        """Return some of the places."""
        at = torch.randint(len(self.hidden_PD), (PLACES_PER_STEP,), generator=generator).to(self.hidden_PD.device)
        return Background(self.hidden_PD[at], self.normaliser_P[at], self.logit_map)

    def taken(self, rows_GD: torch.Tensor, bias_G: torch.Tensor | None = None) -> torch.Tensor:
        """Return, for each row, how much it lowers the base tokens' log probability on average, (G,), in nats.

        Args:
            rows_GD: The rows.
            bias_G: Their entries of the head's bias; None for a head without one.
        """
        logits_GP = rows_GD.to(self.hidden_PD.dtype) @ self.hidden_PD.T
        if bias_G is not None:
            logits_GP = logits_GP + bias_G.to(logits_GP)[:, None]
        return torch.nn.functional.softplus(self.logit_map(logits_GP.float()) - self.normaliser_P).mean(1)


@torch.no_grad()
def sample_background(
    model: FrozenModel, groups: Sequence[Examples], first_new_id: int, generator: torch.Generator
) -> Background:
    """Run the base over snippets and keep final hidden states of some places.

    Args:
        model: The frozen model.
        groups: Snippets, of which the teacher's side is read.
        first_new_id: Id of the first new token (U).
        generator: Source of the choice.
    """
    hidden = []
    for examples in groups:
        part = examples.to(model.device)
        states_WUD = model.hidden(model.embed(part.teacher_WU))
        real_WU = torch.arange(part.teacher_WU.shape[1], device=model.device) < part.teacher_length_W[:, None]
        hidden.append(states_WUD[real_WU])
    every_PD = torch.cat(hidden)
    at = torch.randperm(len(every_PD), generator=generator)[:MAX_PLACES].to(every_PD.device)
    kept_PD = every_PD[at]
    normalisers = (torch.logsumexp(model.logits(part_PD, first_new_id=first_new_id), -1)
                   for part_PD in kept_PD.split(max(1, NORMALISER_NUMBERS // first_new_id)))
    return Background(kept_PD, torch.cat(list(normalisers)), model.logit_map)
