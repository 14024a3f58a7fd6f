"""The optimisation of the rows of one group of tokens.

Shape suffixes: S snippets, T positions from the token on, D hidden size, G tokens of the group, A those still at work.

Every step shows each token that is still at work one of its snippets, so that one pass of the model serves many
optimizers (`clocks.py`). The teacher runs once per text (`contexts.py`), and only over those that a round needs:
rounds begin with few snippets, and only a token that still gains gets to see more.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from vocabext.distill.input_rows.clocks import Clocks, decayed
from vocabext.distill.input_rows.contexts import READ_AT_ONCE, Contexts, chunks, student_states, teach
from vocabext.distill.input_rows.examples import Examples
from vocabext.distill.input_rows.silence import Background
from vocabext.model.frozen import FrozenModel
from vocabext.progress import Task, no_progress


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how.

    Attributes:
        layer: How many layers to run.
        rounds: For each round how many training snippets of a token it uses, and how often it shows one.
        learning_rate: Peak step size, per element.
        positions: Positions of one forward pass at most, padding included; longer steps are cut in parts.
        keep_past: Whether the past of the tokens is kept (exact, and fits), or computed in every step.
        background: Places where the rows should not be written, for a model whose matrices are tied.
        silence: Weight of that, per nat that a row takes from the base tokens.
        bias_G: Entries of the head's bias that the tokens get; None for a head without one.
    """

    layer: int
    rounds: Sequence[tuple[int, int]]
    learning_rate: float
    positions: int = 4_096
    keep_past: bool = True
    background: Background | None = None
    silence: float = 0.0
    bias_G: torch.Tensor | None = None


@dataclass(frozen=True)
class GroupFit:
    """Rows of a group and how well they fit.

    Attributes:
        rows_GD: The chosen rows, float32.
        start_error_G: Held-out error of the rows that training began with.
        end_error_G: Held-out error of the chosen rows, never above the start.
        shown_G: How many snippets each token was shown, repetitions included.
    """

    rows_GD: torch.Tensor
    start_error_G: torch.Tensor
    end_error_G: torch.Tensor
    shown_G: torch.Tensor


@dataclass
class Taught:
    """Snippets and what the teacher made of them, in parts that grow from round to round.

    Attributes:
        task: Told of every snippet that goes through the model.
    """

    task: Task = field(default_factory=lambda: no_progress("").__enter__())
    examples: list[Examples] = field(default_factory=list)
    contexts: list[Contexts] = field(default_factory=list)

    def add(self, model: FrozenModel, examples: Examples, objective: Objective) -> None:
        """Run the teacher over more snippets."""
        self.examples.append(examples)
        self.contexts.append(teach(model, examples, objective.layer, keep_past=objective.keep_past,
                                   advance=self.task.advance))

    def batches(self, chosen: Sequence[torch.Tensor], positions: int, device: torch.device
                ) -> Iterator[tuple[Examples, Contexts]]:
        """Yield chosen snippets of each part, in batches of similar length."""
        for examples, contexts, wanted in zip(self.examples, self.contexts, chosen, strict=True):
            # Without a kept past the student runs over the text before the token as well; with one it only reads it.
            before_S = examples.before_S if contexts.past is None else examples.before_S // READ_AT_ONCE
            length_S = before_S + examples.length_S
            for at in chunks(length_S, wanted, positions):
                part = examples.take(at)
                yield part.to(device), contexts.take(at, part)
                self.task.advance(len(at))


def snippet_errors(
    model: FrozenModel, part: Examples, contexts: Contexts, rows_GD: torch.Tensor, layer: int
) -> torch.Tensor:
    """Return the relative squared error of each snippet, (S,).

    0 is perfect, 1 is as wrong as predicting zero. Dividing by the mean square of the target makes errors
    comparable across layers and models, and gives every snippet of a token the same say.
    """
    hidden_STD = student_states(model, part, contexts.past, rows_GD[part.token_S], layer)
    hidden_STD = hidden_STD[:, : part.ids_ST.shape[1]]
    exact = torch.promote_types(hidden_STD.dtype, torch.float32)
    target_STD = contexts.target_STD.to(hidden_STD.device, exact)
    counted_ST = torch.arange(part.ids_ST.shape[1], device=hidden_STD.device) < part.length_S[:, None]
    error_S = ((hidden_STD.to(exact) - target_STD).square().sum(-1) * counted_ST).sum(-1)
    scale_S = (target_STD.square().sum(-1) * counted_ST).sum(-1)
    return error_S / scale_S.clamp(min=1e-12)


@torch.no_grad()
def held_out_errors(
    model: FrozenModel, taught: Taught, rows_GD: torch.Tensor, objective: Objective,
    active_G: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return each token's mean error over its snippets, (G,): 0 if it is not asked for, infinite if it has none."""
    total_G, count_G = (rows_GD.new_zeros(len(rows_GD), dtype=torch.float32) for _ in range(2))
    wanted = [_of(examples, active_G) for examples in taught.examples]
    for part, contexts in taught.batches(wanted, objective.positions, model.device):
        errors_S = snippet_errors(model, part, contexts, rows_GD, objective.layer).float()
        total_G.index_add_(0, part.token_S, errors_S)
        count_G.index_add_(0, part.token_S, torch.ones_like(errors_S))
    total_G[_unjudged(taught, len(rows_GD)).to(total_G.device)] = math.inf
    return total_G / count_G.clamp(min=1)


def _unjudged(taught: Taught, size: int) -> torch.Tensor:
    """Tell which tokens have no snippets, (G,)."""
    found_G = torch.ones(size, dtype=torch.bool)
    for examples in taught.examples:
        found_G[examples.token_S] = False
    return found_G


def _of(examples: Examples, active_G: torch.Tensor | None) -> torch.Tensor:
    every = torch.arange(len(examples))
    return every if active_G is None else every[active_G.cpu()[examples.token_S]]


def fit_rows(
    model: FrozenModel, train: Sequence[Examples | None], held_out: Examples | None, start_GD: torch.Tensor,
    objective: Objective, generators: Sequence[torch.Generator], other_start_GD: torch.Tensor | None = None,
    task: Task | None = None,
) -> GroupFit:
    """Train the rows of a group.

    Args:
        model: The frozen model.
        train: Training snippets of the group; part i is what round i adds, None if that is nothing.
        held_out: Held-out snippets; they end the rounds, and decide between the start and the result. A token without
            any gets the row of a fixed number of rounds if that fits what it was trained on better than the start, and
            infinite errors.
        start_GD: Initial rows, float32.
        objective: What is minimised.
        generators: For each token the source of the order of its snippets.
        other_start_GD: Other initial rows; a token that they fit better begins there.
        task: Told of every snippet that goes through the model, and of those that need not.

    Returns:
        For each token the best of start and rounds. The start error is that of `start_GD`.
    """
    start_GD = start_GD.to(model.device)
    task = task or no_progress("").__enter__()
    judged, taught = Taught(task), Taught(task)
    if held_out is not None:
        judged.add(model, held_out, objective)
    start_error_G = held_out_errors(model, judged, start_GD, objective)
    clocks = Clocks(start_GD, start_error_G)
    if other_start_GD is not None:
        clocks.begin_elsewhere(other_start_GD.to(model.device),
                               held_out_errors(model, judged, other_start_GD.to(model.device), objective))
    shown_G = torch.zeros(len(start_GD), dtype=torch.long)
    for number, (_, shows) in enumerate(objective.rounds):
        active = clocks.active
        if not len(active):
            break
        part = train[number]
        if part is not None and len(added := _of(part, clocks.active_G)):
            taught.add(model, part.take(added), objective)
        _train_round(model, taught, clocks, objective, shows, generators)
        shown_G[active.cpu()] += shows
        error_G = held_out_errors(model, judged, clocks.rows_GD, objective, clocks.active_G)
        clocks.end_round(active, error_G[active])
        task.skip((len(active) - len(clocks.active)) * sum(shows for _, shows in objective.rounds[number + 1 :]))
    _undo_useless(model, taught, clocks, start_GD, objective)
    return GroupFit(clocks.best_GD.cpu(), start_error_G.cpu(), clocks.best_error_G.cpu(), shown_G)


def _undo_useless(model: FrozenModel, taught: Taught, clocks: Clocks, start_GD: torch.Tensor, objective: Objective
                  ) -> None:
    """Go back to the start with rows that nothing judges and that training has not made better even on its own text."""
    unjudged_G = clocks.best_error_G.isposinf()
    if not bool(unjudged_G.any()) or not taught.examples:
        return
    before_G, after_G = (held_out_errors(model, taught, rows_GD, objective, unjudged_G)
                         for rows_GD in (start_GD, clocks.best_GD))
    undone_G = unjudged_G & ~(after_G < before_G)
    clocks.best_GD[undone_G] = start_GD[undone_G]


def _train_round(
    model: FrozenModel, taught: Taught, clocks: Clocks, objective: Objective, shows: int,
    generators: Sequence[torch.Generator],
) -> None:
    active = clocks.active
    for step, chosen in enumerate(_schedule(taught.examples, active.cpu(), shows, generators)):
        rows_GD = clocks.rows_GD.detach().requires_grad_()
        gradient_GD = torch.zeros_like(rows_GD)
        for part, contexts in taught.batches(chosen, objective.positions, model.device):
            loss = snippet_errors(model, part, contexts, rows_GD, objective.layer).sum()
            gradient_GD += torch.autograd.grad(loss, rows_GD)[0]
        gradient_AD = gradient_GD[active]
        if objective.background is not None and objective.silence:
            gradient_AD += _silence_gradient(objective, clocks.rows_GD[active], active, generators[int(active[0])])
        clocks.step(active, gradient_AD, decayed(objective.learning_rate, step, shows))


def _silence_gradient(
    objective: Objective, rows_AD: torch.Tensor, active: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    assert objective.background is not None
    rows_AD = rows_AD.detach().requires_grad_()
    bias_A = None if objective.bias_G is None else objective.bias_G[active.to(objective.bias_G.device)]
    taken = objective.background.sample(generator).taken(rows_AD, bias_A).sum()
    return torch.autograd.grad(objective.silence * taken, rows_AD)[0]


def _schedule(
    parts: Sequence[Examples], tokens: torch.Tensor, steps: int, generators: Sequence[torch.Generator],
) -> list[list[torch.Tensor]]:
    """Return for every step which snippets of each part are shown: one of each token.

    A token with fewer snippets than the others goes round them more often.
    """
    owner = torch.cat([examples.token_S for examples in parts])
    bounds = torch.tensor([0, *(len(examples) for examples in parts)]).cumsum(0)
    columns = []
    for token in tokens.tolist():
        own = (owner == token).nonzero().flatten()
        times = math.ceil(steps / len(own))
        order = [own[torch.randperm(len(own), generator=generators[token])] for _ in range(times)]
        columns.append(torch.cat(order)[:steps])
    return [[step[(step >= low) & (step < high)] - low for low, high in pairwise(bounds)]
            for step in torch.stack(columns, 1)]
