"""The optimisation of the rows of one group of tokens.

Shape suffixes: S snippets, T positions, D hidden size, G tokens of the group.

Tokens are independent problems that share forward passes. Every step shows each token of the group
the same number of its snippets, so that one dense Adam over the group's rows *is* an optimizer per
token with a clock of its own. The teacher runs once per snippet; its states are kept for the group.
"""

import math
from dataclasses import dataclass

import torch

from vocabext.distill.examples import Examples
from vocabext.distill.silence import Background
from vocabext.model import FrozenModel

BETAS = (0.9, 0.95)
# Snippets that go through the model at once when nothing is trained.
FORWARD_SNIPPETS = 128


@dataclass(frozen=True)
class Fit:
    """Rows of a group and how well they fit.

    Attributes:
        rows_GD: The chosen rows, float32.
        start_error_G: Held-out error of the rows that training began with.
        end_error_G: Held-out error of the chosen rows, never above the start.
    """

    rows_GD: torch.Tensor
    start_error_G: torch.Tensor
    end_error_G: torch.Tensor


@torch.no_grad()
def teacher_states(model: FrozenModel, examples: Examples, layer: int) -> torch.Tensor:
    """Return the states that the student must match, (S, T, D), at student positions."""
    states = []
    for at in torch.arange(len(examples.token_S)).split(FORWARD_SNIPPETS):
        part = examples.take(at).to(model.device)
        hidden_SUD = model.hidden(model.embed(part.teacher_SU), layer=layer)
        index = part.aligned_ST.unsqueeze(-1).expand(-1, -1, hidden_SUD.shape[-1])
        matched_STD = hidden_SUD.gather(1, index)
        states.append(torch.nn.functional.pad(matched_STD, (0, 0, 0, examples.student_ST.shape[1] - index.shape[1])))
    return torch.cat(states)


def snippet_errors(
    model: FrozenModel, examples: Examples, target_STD: torch.Tensor, rows_GD: torch.Tensor, first_new_id: int,
    layer: int,
) -> torch.Tensor:  # fmt: skip
    """Return the relative squared error of each snippet, (S,): 0 is perfect, 1 is as wrong as predicting zero.

    Dividing by the mean square of the target makes errors comparable across layers and models, and
    gives every snippet of a token the same say.
    """
    hidden_STD = model.hidden(model.embed(examples.student_ST, rows_GD, first_new_id), layer=layer)
    target_STD = target_STD[:, : hidden_STD.shape[1]].float()
    error_ST = (hidden_STD.float() - target_STD).square().sum(-1)
    scale_ST = target_STD.square().sum(-1)
    return (error_ST * examples.weight_ST).sum(-1) / (scale_ST * examples.weight_ST).sum(-1).clamp(min=1e-12)


@torch.no_grad()
def held_out_errors(
    model: FrozenModel, examples: Examples, target_STD: torch.Tensor, rows_GD: torch.Tensor, first_new_id: int,
    layer: int,
) -> torch.Tensor:  # fmt: skip
    """Return each token's mean error over its held-out snippets, (G,)."""
    total, count = (torch.zeros(len(rows_GD), device=model.device) for _ in range(2))
    for at in torch.arange(len(examples.token_S)).split(FORWARD_SNIPPETS):
        part = examples.take(at).to(model.device)
        errors_S = snippet_errors(model, part, target_STD[at], rows_GD, first_new_id, layer)
        total.index_add_(0, part.token_S, errors_S)
        count.index_add_(0, part.token_S, torch.ones_like(errors_S))
    return total / count.clamp(min=1)


def fit_rows(
    model: FrozenModel, train: Examples, held_out: Examples, start_GD: torch.Tensor, *, first_new_id: int,
    layer: int, epochs: int, learning_rate: float, batch_snippets: int, generator: torch.Generator,
    background: Background | None = None, silence: float = 0.0,
) -> Fit:  # fmt: skip
    """Train the rows of a group.

    Args:
        model: The frozen model.
        train: Training snippets of the group.
        held_out: Held-out snippets; they decide between the start and the result, token by token.
        start_GD: Initial rows, float32.
        first_new_id: The id that stands for `start_GD[0]` in the examples.
        layer: How many layers to run.
        epochs: Passes over the training snippets.
        learning_rate: Peak step size, per element; decays to zero along a cosine.
        batch_snippets: Snippets of each token per step.
        generator: Source of the order of snippets.
        background: Places where the rows should not be written, for a model whose matrices are tied.
        silence: Weight of that, per nat that a row takes from the base tokens.

    Returns:
        For each token the better of start and result.
    """
    start_GD = start_GD.to(model.device)
    train_target, held_target = teacher_states(model, train, layer), teacher_states(model, held_out, layer)
    rows_GD = start_GD.clone().requires_grad_()
    first_GD, second_GD = torch.zeros_like(start_GD), torch.zeros_like(start_GD)
    schedule = _schedule(train.token_S, len(start_GD), epochs, batch_snippets, generator)
    for step, at in enumerate(schedule):
        part = train.take(at).to(model.device)
        errors_S = snippet_errors(model, part, train_target[at], rows_GD, first_new_id, layer)
        loss = errors_S.sum() / batch_snippets
        if background is not None:
            loss = loss + silence * background.sample(generator).taken(rows_GD).sum()
        (gradient_GD,) = torch.autograd.grad(loss, rows_GD)
        rate = learning_rate * 0.5 * (1 + math.cos(math.pi * step / len(schedule)))
        with torch.no_grad():
            _adam(rows_GD, gradient_GD, first_GD, second_GD, step + 1, rate)
    rows_GD = rows_GD.detach()
    start_error = held_out_errors(model, held_out, held_target, start_GD, first_new_id, layer)
    end_error = held_out_errors(model, held_out, held_target, rows_GD, first_new_id, layer)
    better = (end_error < start_error) & rows_GD.isfinite().all(-1)
    return Fit(torch.where(better.unsqueeze(-1), rows_GD, start_GD).cpu(), start_error.cpu(),
               torch.where(better, end_error, start_error).cpu())  # fmt: skip


def _adam(
    rows_GD: torch.Tensor, gradient_GD: torch.Tensor, first_GD: torch.Tensor, second_GD: torch.Tensor, step: int,
    rate: float,
) -> None:  # fmt: skip
    """Take one Adam step in place (arXiv 1412.6980), without weight decay."""
    first_GD.lerp_(gradient_GD, 1 - BETAS[0])
    second_GD.lerp_(gradient_GD.square(), 1 - BETAS[1])
    scale = (second_GD / (1 - BETAS[1] ** step)).sqrt_().add_(1e-12)
    rows_GD.addcdiv_(first_GD, scale, value=-rate / (1 - BETAS[0] ** step))


def _schedule(
    token_S: torch.Tensor, num_tokens: int, epochs: int, batch_snippets: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return the snippets of every step: the same number for each token, in an order of its own.

    A token with fewer snippets than the others goes round them more often.
    """
    own = [(token_S == token).nonzero().flatten() for token in range(num_tokens)]
    steps = epochs * math.ceil(max(len(o) for o in own) / batch_snippets)
    columns = []
    for snippets in own:
        rounds = math.ceil(steps * batch_snippets / len(snippets))
        order = [snippets[torch.randperm(len(snippets), generator=generator)] for _ in range(rounds)]
        columns.append(torch.cat(order)[: steps * batch_snippets].view(steps, batch_snippets))
    return [torch.cat([column[step] for column in columns]) for step in range(steps)]
