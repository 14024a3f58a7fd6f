"""An optimizer per token: its clock, its end."""

import math

import pytest
import torch

from vocabext.distill.clocks import BETAS, MIN_GAIN, Clocks, decayed


def test_each_row_has_the_adam_of_its_own() -> None:
    torch.manual_seed(0)
    start = torch.randn(2, 4)
    clocks = Clocks(start, torch.ones(2))
    alone = [start[i].clone().requires_grad_() for i in range(2)]
    adams = [torch.optim.Adam([row], lr=0.1, betas=BETAS, eps=1e-12) for row in alone]
    for step, tokens in enumerate(([0, 1], [0], [0], [1], [0, 1])):
        gradient = torch.randn(len(tokens), 4)
        clocks.step(torch.tensor(tokens), gradient, 0.1 / (step + 1))
        for token, row in zip(tokens, gradient, strict=True):
            adams[token].param_groups[0]["lr"] = 0.1 / (step + 1)
            alone[token].grad = row
            adams[token].step()
    assert torch.allclose(clocks.rows_GD, torch.stack(alone), atol=1e-6)
    assert clocks.steps_G.tolist() == [4, 3]


def test_a_row_that_is_absent_from_a_step_does_not_move() -> None:
    clocks = Clocks(torch.zeros(2, 3), torch.ones(2))
    clocks.step(torch.tensor([0, 1]), torch.ones(2, 3), 0.1)
    before = clocks.rows_GD[1].clone()
    clocks.step(torch.tensor([0]), torch.ones(1, 3), 0.1)
    assert torch.equal(clocks.rows_GD[1], before)


def test_a_round_keeps_what_is_better_and_ends_a_token_that_gains_too_little() -> None:
    clocks = Clocks(torch.zeros(4, 2), torch.ones(4))
    every = torch.arange(4)
    clocks.end_round(every, torch.ones(4))
    assert clocks.active.tolist() == [0, 1, 2, 3]  # nobody ends with the first round
    clocks.step(every, torch.ones(4, 2), 0.1)
    clocks.end_round(every, torch.tensor([0.5, 1 - MIN_GAIN / 2, 1.2, math.nan]))
    assert clocks.active.tolist() == [0]
    assert clocks.best_error_G.tolist() == [0.5, torch.tensor(1 - MIN_GAIN / 2).item(), 1.0, 1.0]
    assert (clocks.best_GD[:, 0] != 0).tolist() == [True, True, False, False]
    clocks.step(torch.tensor([0]), torch.ones(1, 2), 0.1)
    clocks.end_round(torch.tensor([0]), torch.tensor([0.6]))
    assert clocks.active.tolist() == []
    assert clocks.best_error_G[0] == 0.5


def test_rows_that_are_no_numbers_are_never_the_best() -> None:
    clocks = Clocks(torch.zeros(1, 2), torch.ones(1))
    for _ in range(2):
        clocks.step(torch.tensor([0]), torch.full((1, 2), math.nan), 0.1)
        clocks.end_round(torch.tensor([0]), torch.tensor([0.1]))
    assert torch.equal(clocks.best_GD, torch.zeros(1, 2))
    assert clocks.active.tolist() == []


def test_the_step_size_decays_from_the_peak_to_nearly_nothing() -> None:
    rates = [decayed(0.4, step, 10) for step in range(10)]
    assert rates[0] == 0.4
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.02


def test_a_token_begins_at_the_start_that_fits_better() -> None:
    clocks = Clocks(torch.zeros(2, 3), torch.tensor([0.5, 0.5]))
    clocks.begin_elsewhere(torch.ones(2, 3), torch.tensor([0.4, 0.6]))
    assert clocks.rows_GD[:, 0].tolist() == clocks.best_GD[:, 0].tolist() == [1.0, 0.0]
    assert clocks.best_error_G.tolist() == pytest.approx([0.4, 0.5])
