"""An optimizer per token: its steps, its end; and what the tokens learn from each other."""

import math

import pytest
import torch

from vocabext.distill.input_rows.clocks import DAMPING, MIN_GAIN, MOMENTUM, Clocks, Directions, decayed


def test_a_step_is_as_long_as_the_rate_whatever_the_gradient() -> None:
    torch.manual_seed(0)
    for size in (1e-8, 1.0, 1e8):
        clocks = Clocks(torch.zeros(3, 5), torch.ones(3))
        for step in range(4):
            before = clocks.rows_GD.clone()
            clocks.step(torch.arange(3), size * torch.randn(3, 5), 0.1 / (step + 1))
            lengths = (clocks.rows_GD - before).square().mean(1).sqrt()
            assert lengths.tolist() == pytest.approx([0.1 / (step + 1)] * 3, rel=1e-4)


def test_directions_are_learned_from_all_gradients() -> None:
    torch.manual_seed(0)
    steep = torch.tensor([10.0, 1.0, 1.0, 0.1])
    directions, seen = Directions(4, torch.float32, torch.device("cpu")), []
    for _ in range(4):
        seen.append(torch.randn(50, 4) * steep)
        directions.see(seen[-1])
    unit = torch.nn.functional.normalize(torch.cat(seen))
    values, vectors = torch.linalg.eigh(unit.T @ unit)
    wanted = torch.ones(4) @ vectors @ torch.diag((values + DAMPING * values.mean()) ** -0.5) @ vectors.T
    step = directions.step(torch.ones(1, 4))[0]
    assert torch.allclose(step, 2 * wanted / wanted.norm(), atol=1e-5)
    assert abs(float(step[0])) < abs(float(step[1])) < abs(float(step[3]))


def test_without_a_gradient_there_is_no_step() -> None:
    directions = Directions(3, torch.float32, torch.device("cpu"))
    directions.see(torch.zeros(2, 3))
    assert torch.equal(directions.step(torch.zeros(2, 3)), torch.zeros(2, 3))
    directions.see(torch.ones(1, 3))
    assert directions.step(torch.ones(1, 3)).isfinite().all()


def test_each_row_has_a_momentum_of_its_own() -> None:
    clocks = Clocks(torch.zeros(2, 2), torch.ones(2))
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    both = torch.arange(2)
    for _ in range(2):  # as much of one as of the other, so that no direction is preferred
        clocks.step(both, torch.cat((east, north)), 0.1)
    before = clocks.rows_GD[0].clone()
    clocks.step(torch.tensor([0]), north, 0.1)
    moved = before - clocks.rows_GD[0]
    kept = MOMENTUM * (1 - MOMENTUM**2)  # of the first two
    assert float(moved[0] / moved[1]) == pytest.approx(kept / (1 - MOMENTUM), rel=1e-4)
    clocks.end_round(both, torch.tensor([0.5, 0.5]))
    before = clocks.rows_GD[0].clone()
    clocks.step(torch.tensor([0]), east, 0.1)
    assert float(before[1] - clocks.rows_GD[0, 1]) == pytest.approx(0, abs=1e-6)  # a new round knows nothing of it


def test_a_gradient_that_is_no_number_teaches_the_others_nothing() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(3, 4)
    alone, beside = Clocks(torch.zeros(3, 4), torch.ones(3)), Clocks(torch.zeros(4, 4), torch.ones(4))
    for _ in range(3):
        alone.step(torch.arange(3), gradients, 0.1)
        beside.step(torch.arange(4), torch.cat((gradients, torch.full((1, 4), math.nan))), 0.1)
    assert torch.allclose(alone.rows_GD, beside.rows_GD[:3])
    assert beside.rows_GD[3].isnan().all()


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
    assert 0 < rates[-1] < 0.05


def test_a_token_begins_at_the_start_that_fits_better() -> None:
    clocks = Clocks(torch.zeros(2, 3), torch.tensor([0.5, 0.5]))
    clocks.begin_elsewhere(torch.ones(2, 3), torch.tensor([0.4, 0.6]))
    assert clocks.rows_GD[:, 0].tolist() == clocks.best_GD[:, 0].tolist() == [1.0, 0.0]
    assert clocks.best_error_G.tolist() == pytest.approx([0.4, 0.5])
