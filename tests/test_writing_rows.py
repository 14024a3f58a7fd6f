"""Output rows: the fit writes where it should, held-out places choose the caution, the rest stays silent."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vocabext.expansion import Expansion
from vocabext.records import NewToken, TokenSnippets
from vocabext.vocabulary import MAX_NORM_RATIO
from vocabext.writing import rows as module
from vocabext.writing.fit import Fit, Task, capped, longest_runs
from vocabext.writing.measure import find_uses, measure_writing, per_token
from vocabext.writing.places import Places
from vocabext.writing.rows import _reports, make_output_rows, silent_row

LENGTHS = torch.tensor([2, 3])


def made_places(hidden_PD: torch.Tensor, runs: list[tuple[int, int]], top: float = 3.0) -> Places:
    """Places at which base's greedy continuation writes some runs, given as (place, token)."""
    size = len(hidden_PD)
    zeros = torch.zeros(size, dtype=torch.long)
    place_R, token_R = (torch.tensor([pair[side] for pair in runs], dtype=torch.long) for side in (0, 1))
    return Places(hidden_PD, torch.full((size,), top), zeros, torch.full((size,), top + 1), zeros, zeros, zeros,
                  place_R, token_R, torch.zeros(len(runs)), torch.ones(len(runs), dtype=torch.bool))  # fmt: skip


def planted(size: int, seed: int) -> tuple[Places, list[int]]:
    """States whose first two directions say which token is deserved."""
    generator = torch.Generator().manual_seed(seed)
    kind = [i % 6 for i in range(size)]
    hidden_PD = torch.randn(size, 8, generator=generator)
    hidden_PD[:, 7] = 1.0
    for i, which in enumerate(kind):
        hidden_PD[i, 0] = 4.0 if which == 0 else -4.0
        hidden_PD[i, 1] = 4.0 if which == 1 else -4.0
    return made_places(hidden_PD, [(i, which) for i, which in enumerate(kind) if which < 2]), kind


def fitted(places: Places, caution: float = 1.0, cap: float | None = None) -> torch.Tensor:
    fit = Fit(Task(places, longest_runs(places, LENGTHS), cap), 2, torch.device("cpu"))
    fit.train(60, caution)
    return fit.rows_ND


@pytest.mark.parametrize("cap", [None, 30.0])
def test_the_fit_writes_at_new_places_that_deserve_it_and_nowhere_else(cap: float | None) -> None:
    rows_ND = fitted(planted(3_000, 0)[0], cap=cap)
    places, kind = planted(600, 1)
    uses = find_uses(places, rows_ND, cap)
    assert uses.on_top_P.tolist() == [which < 2 for which in kind]
    assert uses.right_P[uses.on_top_P].all()
    found = measure_writing(places, uses, LENGTHS)
    assert (found.adoption, found.false_use) == (1.0, 0.0)
    assert found.adopted_pieces == found.adoptable_pieces == 100 * 1 + 100 * 2
    assert found.nll_rise_nats < 0.05 < 1 < found.nll_rise_everywhere_nats


def test_caution_makes_wrong_uses_rarer() -> None:
    places, _ = planted(3_000, 0)
    noise = torch.Generator().manual_seed(5)
    blurred = replace(places, hidden_PD=places.hidden_PD + 5 * torch.randn(3_000, 8, generator=noise))
    found = [measure_writing(blurred, find_uses(blurred, fitted(blurred, caution)), LENGTHS) for caution in (1.0, 8.0)]
    assert found[0].false_use > 2 * found[1].false_use > 0
    assert found[0].adoption is not None
    assert found[1].adoption is not None
    assert found[0].adoption > found[1].adoption > 0


def test_the_longest_run_is_the_label() -> None:
    places = made_places(torch.zeros(3, 2), [(0, 1), (0, 0), (1, 0)])
    assert longest_runs(places, LENGTHS).tolist() == [1, 0, 2]


def test_uses_are_counted_against_base_own_continuation() -> None:
    # Logits of the two rows are the two numbers of each state; base's best is 3, its normaliser 4.
    places = made_places(torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.0], [0.0, 0.0]]), [(0, 0), (1, 0), (3, 1)])
    uses = find_uses(places, torch.eye(2))
    assert uses.token_P.tolist()[:3] == [0, 1, 0]
    found = measure_writing(places, uses, LENGTHS)
    assert (found.places, found.deserved, found.adoption, found.false_use) == (4, 3, 1 / 3, 0.5)
    rise = [math.log1p((math.exp(a) + math.exp(b)) / math.exp(4)) for a, b in places.hidden_PD.tolist()]
    assert found.nll_rise_nats == pytest.approx(rise[2])
    assert found.nll_rise_everywhere_nats == pytest.approx(sum(rise) / 4)
    assert (found.adopted_pieces, found.adoptable_pieces) == (1, 1 + 1 + 2)
    assert [count.tolist() for count in per_token(uses, 2)] == [[1, 0], [1, 1]]


def test_another_token_whose_run_base_writes_is_right_too() -> None:
    places = made_places(torch.tensor([[5.0, 0.0]]), [(0, 0), (0, 1)])
    assert measure_writing(places, find_uses(places, torch.eye(2)), LENGTHS).adoption == 1.0


def test_logits_are_bounded_as_in_the_model() -> None:
    assert capped(torch.tensor([100.0]), 30.0).item() == pytest.approx(30 * math.tanh(100 / 30))
    places = made_places(torch.tensor([[100.0, 0.0]]), [], top=31.0)
    assert bool(find_uses(places, torch.eye(2)).on_top_P[0])
    assert not bool(find_uses(places, torch.eye(2), 30.0).on_top_P[0])


def test_a_silent_row_is_below_a_base_row_at_every_state() -> None:
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(40, 16, generator=generator)
    head_VD[[7, 21]] -= 3 * torch.ones(16)  # unlikely wherever the states are
    head_VD[39] = -100.0  # a row that is not in use
    hidden_PD = torch.randn(600, 16, generator=generator) + torch.ones(16)
    logits_PV = hidden_PD @ head_VD[:39].T
    places = replace(made_places(hidden_PD, []), normaliser_P=logits_PV.logsumexp(1))
    row_D, leak, ids = silent_row(head_VD, places, 39)
    assert torch.allclose(row_D, head_VD[list(ids)].mean(0))
    assert torch.allclose(row_D, head_VD[[7, 21]].mean(0))
    shares = torch.exp(hidden_PD @ row_D - places.normaliser_P)
    assert leak == pytest.approx(float(shares.max()), rel=1e-3)
    zeros = torch.exp(-places.normaliser_P)
    assert leak < 1e-3 * float(zeros.max())
    anywhere = 50 * torch.randn(5_000, 16, generator=generator)
    assert bool((anywhere @ row_D < (anywhere @ head_VD[:39].T).amax(1)).all())


def record(name: str) -> TokenSnippets:
    return TokenSnippets(NewToken(name, name, (1, 2)))


def test_tokens_that_are_more_often_wrong_than_right_are_named() -> None:
    states = torch.tensor([[5.0, 0.0, 0.0]] * 3 + [[0.0, 5.0, 0.0]] * 2 + [[0.0, 0.0, 0.0]])
    places = made_places(states, [(0, 0), (1, 0), (3, 1), (5, 2)])
    places = replace(places, hidden_PD=states)
    wrong = torch.eye(3)
    reports = _reports([record("a"), record("b"), record("c")], places, find_uses(places, wrong))
    assert [(r.deserved, r.right, r.wrong) for r in reports] == [(2, 2, 1), (1, 1, 1), (1, 0, 0)]
    assert [r.silent for r in reports] == [None, None, "never right at 1 held-out places that deserve it"]
    worse = find_uses(made_places(states, [(0, 0)]), wrong)
    reports = _reports([record("a"), record("b"), record("c")], made_places(states, [(0, 0)]), worse)
    assert reports[0].silent == "wrong at 2 held-out places, right at 1"
    assert reports[1].silent == "no place to judge it by"


def expansion(records: list[TokenSnippets]) -> Expansion:
    return Expansion([made.new_token for made in records], 4)


def fake_model() -> Any:
    weight = torch.arange(12.0).view(4, 3)
    head = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(bias=None))
    return SimpleNamespace(head_VD=weight, device=torch.device("cpu"), logit_cap=None, model=head)


def test_the_baselines_need_no_text() -> None:
    records = [record("a"), record("b")]
    mean = make_output_rows("mean", records, fake_model(), expansion(records))
    assert mean.output_ND.tolist() == [[4.5, 5.5, 6.5]] * 2
    zero = make_output_rows("zero", records, fake_model(), expansion(records))
    assert 0 < float(zero.output_ND.abs().max()) < 1e-3


def test_held_out_places_choose_the_caution_and_silence_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third token that is never deserved gets the silent row; wrong use stays below the bound."""
    places, _ = planted(3_000, 0)
    noise = torch.Generator().manual_seed(5)
    blurred = replace(places, hidden_PD=places.hidden_PD + 4 * torch.randn(3_000, 8, generator=noise))
    monkeypatch.setattr(module, "_windows", lambda *_: ([1], [2]))
    monkeypatch.setattr(module, "_read", lambda *_: blurred)
    monkeypatch.setattr(module, "FIRST_EPOCHS", 40.0)
    monkeypatch.setattr(module, "TRY_EPOCHS", 20.0)
    head_VD = torch.tensor([[2.0], [1.0], [-1.0], [-2.0]]) * torch.eye(8)[7]
    model = SimpleNamespace(**{**vars(fake_model()), "head_VD": head_VD})
    records = [TokenSnippets(NewToken(n, n, run)) for n, run in (("a", (1, 2)), ("b", (1, 2, 3)), ("c", (3, 3)))]
    made = make_output_rows("fit", records, model, expansion(records), false_use=0.02)  # type: ignore[arg-type]
    assert made.caution is not None
    assert made.caution > 1
    assert made.held_out is not None
    assert made.held_out.adoption is not None
    assert made.held_out.false_use < 0.03
    assert made.held_out.adoption > 0.1
    assert [token.silent is None for token in made.tokens] == [True, True, False]
    silent_D, leak, _ = silent_row(model.head_VD, blurred, 4)
    assert torch.equal(made.output_ND[2], silent_D)
    assert made.leak == pytest.approx(leak, rel=1e-2)
    summary = made.summary()
    assert summary["written"] == 2
    assert [token["token"] for token in summary["silent"]] == ["c"]  # type: ignore[attr-defined]
    quiet = make_output_rows("none", records, model, expansion(records))  # type: ignore[arg-type]
    assert torch.equal(quiet.output_ND[0], quiet.output_ND[2])
    assert not find_uses(blurred, quiet.output_ND).on_top_P.any()


def test_rows_are_capped_below_what_verify_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure is the longest base row in use, and rounding leaves the cap below the limit of `verify`."""
    places, _ = planted(600, 0)
    monkeypatch.setattr(module, "_windows", lambda *_: ([1], [2]))
    monkeypatch.setattr(module, "_read", lambda *_: places)
    monkeypatch.setattr(module, "_fit", lambda *_: (100 * torch.eye(8)[:2], 1.0))
    head_VD = torch.tensor([[2.0], [1.0], [-1.0], [-2.0], [50.0]]) * torch.eye(8)[7]  # the last one is not in use
    model = SimpleNamespace(**{**vars(fake_model()), "head_VD": head_VD})
    records = [TokenSnippets(NewToken(n, n, run)) for n, run in (("a", (1, 2)), ("b", (1, 2, 3)))]
    made = make_output_rows("fit", records, model, expansion(records))  # type: ignore[arg-type]
    assert [token.silent for token in made.tokens] == [None, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for norm in made.output_ND.to(dtype).float().norm(dim=1).tolist():
            assert 0.95 * MAX_NORM_RATIO * 2.0 < norm < 0.99 * MAX_NORM_RATIO * 2.0
