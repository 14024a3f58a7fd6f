"""One model that is base and healed: the adapter is switched off for the one, and on for the other.

Shape suffixes: N new tokens, D hidden size, B windows, T expanded ids, P places, Q positions of the base's text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vocabext.heal.loss import Head, first_piece_loss, unit_loss
from vocabext.heal.targets import UnitShares, unit_targets
from vocabext.heal.text import Batch
from vocabext.model.frozen import FrozenModel
from vocabext.tokens import Expansion


@dataclass(frozen=True)
class Loss:
    """The divergence of a batch.

    Attributes:
        total: What is minimised, per place.
        first_pieces: The divergence of first pieces, nats per place.
        units: That of units with the same first piece, nats per place.
    """

    total: torch.Tensor
    first_pieces: float
    units: float


class Student:
    """The base with an adapter and with rows of its own.

    Attributes:
        model: The base; its layers hold the adapter.
        adapter: The peft model around it.
        input_ND: Input rows, which are trained.
        output_ND: Output rows; the same tensor where the head is tied.
    """

    def __init__(self, model: FrozenModel, adapter: Any, expansion: Expansion, shares: UnitShares,
                 input_ND: torch.Tensor, output_ND: torch.Tensor | None, new_bias_N: torch.Tensor | None,
                 objective: str = "runs") -> None:
        self.model, self.adapter, self.expansion, self.shares = model, adapter, expansion, shares
        self.input_ND = torch.nn.Parameter(input_ND.float().clone().to(model.device))
        self.output_ND = self.input_ND if output_ND is None else torch.nn.Parameter(
            output_ND.float().clone().to(model.device))
        self.head = Head.of(model, shares.first_N, expansion.first_new_id, new_bias_N)
        self.objective = objective

    @property
    def rows(self) -> list[torch.nn.Parameter]:
        """The rows, each once."""
        return [self.input_ND] if self.output_ND is self.input_ND else [self.input_ND, self.output_ND]

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """The adapter's own parameters."""
        return [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Let the model be the base, without gradients."""
        with torch.no_grad(), self.adapter.disable_adapter():
            yield

    def hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the healed model's final states, (B, T, D)."""
        return self.model.hidden(self.model.embed(ids_BT, self.input_ND, self.expansion.first_new_id))

    def loss(self, batch: Batch, head: Head | None = None) -> Loss:
        """Compare what comes next after every place, as healed model and base see it.

        Args:
            batch: The text.
            head: The head, thinned; None for the whole.
        """
        device = self.model.device
        with self.as_base():
            base_QD = self.model.hidden(self.model.embed(batch.base_BL.to(device)))[batch.real_BL.to(device)]
        hidden_PD = self.hidden(batch.ids_BT.to(device)).flatten(0, 1)
        num_places = len(hidden_PD)
        weight_P = hidden_PD.new_full((num_places,), 1 / num_places, dtype=torch.float32)
        first, _, normaliser_Q = first_piece_loss(hidden_PD, self.output_ND, base_QD, batch.position_P.to(device),
                                                  weight_P, head or self.head)
        units = self._units(batch, hidden_PD, base_QD, normaliser_Q)
        return Loss(first + units, float(first.detach()), float(units.detach()))

    def _units(self, batch: Batch, hidden_PD: torch.Tensor, base_QD: torch.Tensor, normaliser_Q: torch.Tensor
               ) -> torch.Tensor:
        head, device = self.head, self.model.device
        normaliser = normaliser_Q.cpu()

        @torch.no_grad()
        def logs(position: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
            return head.logits_at(base_QD[position.to(device)], piece.to(device)).cpu() - normaliser[position]

        starts_P = batch.position_P + 1
        in_tree = torch.isin(batch.pieces_Q[starts_P], self.shares.first_N).nonzero().flatten()
        if not len(in_tree) or self.objective == "pieces":
            return hidden_PD.new_zeros((), dtype=torch.float32)
        target_AN, first_A = unit_targets(self.shares, batch.pieces_Q, starts_P[in_tree], logs)
        if self.objective == "text":
            following_BT = torch.cat((batch.ids_BT[:, 1:], torch.zeros_like(batch.ids_BT[:, :1])), 1)
            unit_A = following_BT.flatten()[in_tree] - self.expansion.first_new_id
            target_AN = torch.zeros_like(target_AN)
            target_AN[(unit_A >= 0).nonzero().flatten(), unit_A[unit_A >= 0]] = 1.0
        weight_A = torch.full((len(in_tree),), 1 / len(hidden_PD), device=device)
        return unit_loss(hidden_PD[in_tree.to(device)], self.output_ND, target_AN.to(device), first_A.to(device),
                         weight_A, head, self.shares.first_N.to(device))
