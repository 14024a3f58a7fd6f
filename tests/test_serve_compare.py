import numpy as np
import pytest

from vocabext.errors import ServerError
from vocabext.serve.bench.compare import FASTER, NO_DIFFERENCE, SLOWER, TOO_FEW, TOO_NOISY, Series, compare, verdict

ROUNDS, REQUESTS = 5, 6


def series(random: np.random.Generator, *, factor: float = 1.0, noise: float = 0.02, drift: float = 0.0,
           place: int = 0) -> Series:
    """Plant measurements: a cost per request, times noise per round and per request, times a drift over time."""
    texts = np.linspace(0.8, 1.2, REQUESTS)  # texts differ, the same way for every server
    time = np.exp(drift * (3 * np.arange(ROUNDS) + place))[:, None]
    jitter = np.exp(noise * (random.standard_normal((ROUNDS, 1)) + random.standard_normal((ROUNDS, REQUESTS))))
    return Series(factor * texts * time * jitter, np.ones((ROUNDS, REQUESTS)))


def planted(
    seed: int, *, factor: float = 1.0, noise: float = 0.02, drift: float = 0.0
) -> tuple[Series, Series, Series]:
    random = np.random.default_rng(seed)
    return (series(random, noise=noise, drift=drift), series(random, factor=factor, noise=noise, drift=drift, place=1),
            series(random, noise=noise, drift=drift, place=2))


def test_a_server_that_is_a_tenth_faster_is_found() -> None:
    result = compare(*planted(0, factor=1 / 1.1, noise=0.01))
    assert result.verdict == FASTER
    assert result.speedup == pytest.approx(1.1, rel=0.03)
    assert result.speedup_interval[0] < 1.1 < result.speedup_interval[1]


def test_a_server_with_a_fixed_delay_is_found() -> None:
    first, expanded, second = planted(1)
    slow = Series(expanded.seconds_RQ + 0.3, expanded.amount_RQ)
    assert compare(first, slow, second).verdict == SLOWER


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.002, 0.02, 0.05])
def test_base_against_base_is_no_difference_in_19_of_20_repetitions(noise: float) -> None:
    verdicts = [compare(*planted(seed, noise=noise)).verdict for seed in range(100)]
    assert verdicts.count(NO_DIFFERENCE) >= 95


@pytest.mark.slow
@pytest.mark.parametrize("requests", [1, REQUESTS])
def test_a_false_alarm_stays_rare_however_wild_the_noise(requests: int) -> None:
    def one(seed: int) -> str:
        first, expanded, second = (Series(s.seconds_RQ[:, :requests], s.amount_RQ[:, :requests])
                                   for s in planted(seed, noise=0.2))
        return compare(first, expanded, second).verdict

    verdicts = [one(seed) for seed in range(100)]
    assert sum(v in (FASTER, SLOWER) for v in verdicts) <= 5
    assert TOO_NOISY in verdicts  # it says that it cannot tell, rather than that there is nothing


def test_a_real_difference_below_the_noise_is_not_claimed() -> None:
    assert compare(*planted(2, factor=1 / 1.02, noise=0.2)).verdict == TOO_NOISY
    assert compare(*planted(2, factor=1 / 1.01, noise=0.02)).verdict == NO_DIFFERENCE


def test_a_machine_that_slows_down_steadily_makes_no_difference() -> None:
    result = compare(*planted(3, noise=1e-4, drift=0.05))
    assert result.speedup == pytest.approx(1.0, abs=1e-3)
    assert result.noise == pytest.approx(np.exp(-0.1), rel=1e-2)  # the base itself is slower the second time
    assert result.verdict == NO_DIFFERENCE


def test_costs_are_per_character_and_not_per_request() -> None:
    first, expanded, second = planted(4, noise=1e-3)
    twice_the_text = Series(2 * expanded.seconds_RQ, 2 * expanded.amount_RQ)
    assert compare(first, twice_the_text, second).speedup == pytest.approx(1.0, abs=0.01)


def test_which_texts_were_drawn_is_part_of_the_interval() -> None:
    # Every round repeats exactly, but the answers to the few prompts differ in length: no claim can rest on them.
    amount = np.tile([80.0, 120.0, 90.0, 130.0], (ROUNDS, 1))
    seconds = np.ones_like(amount)
    other = np.tile([130.0, 95.0, 110.0, 100.0], (ROUNDS, 1))
    result = compare(Series(seconds, amount), Series(seconds, other), Series(seconds, amount))
    assert result.speedup_interval[0] < 1 < result.speedup_interval[1]
    assert result.verdict == NO_DIFFERENCE


def test_a_failed_request_is_left_out_of_its_round_for_all_three() -> None:
    first, expanded, second = planted(5, noise=1e-3)
    seconds = expanded.seconds_RQ.copy()
    seconds[2, 5] = np.nan  # the longest text of round 3: without it, all three get cheaper
    result = compare(first, Series(seconds, expanded.amount_RQ), second)
    assert result.speedup == pytest.approx(1.0, abs=0.01)
    assert result.rounds[2][0] == pytest.approx(np.median(first.seconds_RQ[2, :5]))


def test_a_round_without_a_single_success_is_lost_and_counted() -> None:
    first, expanded, second = planted(6, factor=1 / 2)
    seconds = expanded.seconds_RQ.copy()
    seconds[1] = np.nan
    seconds[2, 0] = np.nan
    result = compare(first, Series(seconds, expanded.amount_RQ), second)
    assert (result.lost_rounds, result.left_out, len(result.rounds)) == (1, 1, ROUNDS - 1)
    assert result.verdict == TOO_FEW  # four rounds are no ground for a verdict


def test_without_any_success_there_is_nothing_to_compare() -> None:
    first, expanded, second = planted(6)
    nothing = Series(np.full_like(expanded.seconds_RQ, np.nan), expanded.amount_RQ)
    with pytest.raises(ServerError, match="no request of any round succeeded on both servers"):
        compare(first, nothing, second)


def test_a_round_with_one_success_survives_the_bootstrap() -> None:
    first, expanded, second = planted(7)
    seconds = expanded.seconds_RQ.copy()
    seconds[1, 1:] = np.nan
    result = compare(first, Series(seconds, expanded.amount_RQ), second)
    assert np.isfinite(result.speedup_interval).all()


@pytest.mark.parametrize(("interval", "floor", "expected"), [
    ((1.06, 1.2), 1.05, FASTER), ((1.04, 1.2), 1.05, NO_DIFFERENCE), ((0.8, 0.94), 1.05, SLOWER),
    ((0.8, 0.96), 1.05, NO_DIFFERENCE), ((0.9, 1.1), 1.0, NO_DIFFERENCE),
])
def test_a_verdict_needs_the_whole_interval_outside_the_noise_floor(
    interval: tuple[float, float], floor: float, expected: str
) -> None:
    assert verdict(interval, floor) == expected


def test_the_verdict_on_noise_and_on_few_rounds() -> None:
    assert verdict((0.9, 1.4), 1.3) == TOO_NOISY
    assert verdict((1.5, 1.9), 1.3) == FASTER
    assert verdict((1.5, 1.9), 1.3, num_rounds=4) == TOO_FEW


def test_a_few_requests_that_were_held_up_change_nothing() -> None:
    first, expanded, second = planted(9, factor=1 / 1.3)
    seconds = expanded.seconds_RQ.copy()
    seconds[::2, 0] *= 3
    result = compare(first, Series(seconds, expanded.amount_RQ), second)
    assert result.speedup == pytest.approx(1.3, rel=0.03)
    assert result.verdict == FASTER


def test_the_same_seed_gives_the_same_result() -> None:
    assert compare(*planted(8), seed=3) == compare(*planted(8), seed=3)
