"""Output rows: the fit writes where it should, held-out places choose the caution, the rest stays silent."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_writing import NUM_BASE, sharp_model, some_tokens

from vocabext.checkpoint.rows import mean_rows, rows_in_use
from vocabext.checkpoint.vocabulary import MAX_NORM_RATIO
from vocabext.distill.output_rows import stage as module
from vocabext.distill.output_rows.fit import OutputFit, Targets, longest_runs
from vocabext.distill.output_rows.stage import _reports, make_output_rows, silent_row
from vocabext.distill.overlap import text_numbers
from vocabext.errors import UsageError
from vocabext.model.logit_map import LogitMap
from vocabext.model.places import Places
from vocabext.model.run_tree import RunTree
from vocabext.model.writing import Writing, find_uses, measure_writing, per_token
from vocabext.options import DistillConfig
from vocabext.progress import no_progress
from vocabext.tokens import Expansion, NewToken, TokenSnippets

LENGTHS = torch.tensor([2, 3])


def made_places(hidden_PD: torch.Tensor, runs: list[tuple[int, int]], top: float = 3.0) -> Places:
    """Places at which base's greedy continuation writes some runs, given as (place, token)."""
    size = len(hidden_PD)
    zeros = torch.zeros(size, dtype=torch.long)
    place_R, token_R = (torch.tensor([pair[side] for pair in runs], dtype=torch.long) for side in (0, 1))
    return Places(hidden_PD, torch.full((size,), top), zeros, torch.full((size,), top + 1), zeros, zeros, zeros,
                  torch.zeros(size), place_R, token_R, torch.zeros(len(runs)), torch.ones(len(runs), dtype=torch.bool),
                  num_windows=1)


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
    fit = OutputFit(Targets(places, longest_runs(places, LENGTHS), LogitMap(cap=cap)), 2, torch.device("cpu"))
    fit.train(60, caution)
    return fit.rows_ND


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 30.0])
def test_the_fit_writes_at_new_places_that_deserve_it_and_nowhere_else(cap: float | None) -> None:
    rows_ND = fitted(planted(3_000, 0)[0], cap=cap)
    places, kind = planted(600, 1)
    uses = find_uses(places, rows_ND, LogitMap(cap=cap))
    assert uses.on_top_P.tolist() == [which < 2 for which in kind]
    assert uses.right_P[uses.on_top_P].all()
    found = measure_writing(places, uses, LENGTHS)
    assert (found.adoption, found.false_use) == (1.0, 0.0)
    assert found.adopted_pieces == found.adoptable_pieces == 100 * 1 + 100 * 2
    assert found.nll_rise_nats < 0.05 < 1 < found.nll_rise_everywhere_nats


@pytest.mark.slow
def test_caution_makes_wrong_uses_rarer() -> None:
    places, _ = planted(3_000, 0)
    noise = torch.Generator().manual_seed(5)
    blurred = replace(places, hidden_PD=places.hidden_PD + 5 * torch.randn(3_000, 8, generator=noise))
    found = [measure_writing(blurred, find_uses(blurred, fitted(blurred, caution), LogitMap()), LENGTHS)
             for caution in (1.0, 8.0)]
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
    uses = find_uses(places, torch.eye(2), LogitMap())
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
    assert measure_writing(places, find_uses(places, torch.eye(2), LogitMap()), LENGTHS).adoption == 1.0


def test_logits_are_bounded_as_in_the_model() -> None:
    assert LogitMap(cap=30.0)(torch.tensor([100.0])).item() == pytest.approx(30 * math.tanh(100 / 30))
    places = made_places(torch.tensor([[100.0, 0.0]]), [], top=31.0)
    assert bool(find_uses(places, torch.eye(2), LogitMap()).on_top_P[0])
    assert not bool(find_uses(places, torch.eye(2), LogitMap(cap=30.0)).on_top_P[0])


def test_a_silent_row_is_below_a_base_row_at_every_state() -> None:
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(40, 16, generator=generator)
    head_VD[[7, 21]] -= 3 * torch.ones(16)  # unlikely wherever the states are
    head_VD[39] = -100.0  # a row that is not in use
    hidden_PD = torch.randn(600, 16, generator=generator) + torch.ones(16)
    logits_PV = hidden_PD @ head_VD[:39].T
    places = replace(made_places(hidden_PD, []), normaliser_P=logits_PV.logsumexp(1))
    row_D, leak, ids = silent_row(head_VD, [places], 39, LogitMap())
    assert torch.allclose(row_D, head_VD[list(ids)].mean(0))
    assert torch.allclose(row_D, head_VD[[7, 21]].mean(0))
    shares = torch.exp(hidden_PD @ row_D - places.normaliser_P)
    assert leak == pytest.approx(float(shares.max()), rel=1e-3)
    zeros = torch.exp(-places.normaliser_P)
    assert leak < 1e-3 * float(zeros.max())
    anywhere = 50 * torch.randn(5_000, 16, generator=generator)
    assert bool((anywhere @ row_D < (anywhere @ head_VD[:39].T).amax(1)).all())


def test_a_silent_row_is_made_of_rows_in_use_only() -> None:
    """Never of zero rows, rows next to nothing, reserved ids, ids beyond the tokenizer, or rows that are equal."""
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(40, 16, generator=generator)
    unlikely_D = -3 * torch.ones(16)
    head_VD[3], head_VD[4] = 0.0, 1e-6
    head_VD[[5, 6, 7]] = 2 * unlikely_D  # never trained: all the same
    head_VD[[8, 39]] += 2 * unlikely_D  # 8 is reserved, 39 beyond the tokenizer
    head_VD[[20, 21]] += unlikely_D
    hidden_PD = torch.rand(600, 16, generator=generator) + torch.ones(16)
    places = replace(made_places(hidden_PD, []), normaliser_P=(hidden_PD @ head_VD[:39].T).logsumexp(1))
    usable_V = rows_in_use(head_VD, 39, [8])
    assert (~usable_V).nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 8]
    for dtype in (torch.float32, torch.bfloat16):
        ids = silent_row(head_VD.to(dtype), [places], 39, LogitMap(), usable_V)[2]
        assert sorted(ids) == [20, 21]
    with pytest.raises(UsageError, match="all 39 output rows of the model are zero"):
        silent_row(0 * head_VD, [places], 39, LogitMap())
    opposite_VD = torch.stack((unlikely_D, -unlikely_D))
    row_D, _, ids = silent_row(opposite_VD, [places], 2, LogitMap())
    assert (ids, torch.equal(row_D, unlikely_D)) == ((0,), True)


def record(name: str) -> TokenSnippets:
    return TokenSnippets(NewToken(name, name, (1, 2)))


def test_tokens_that_are_more_often_wrong_than_right_are_named() -> None:
    states = torch.tensor([[5.0, 0.0, 0.0]] * 3 + [[0.0, 5.0, 0.0]] * 2 + [[0.0, 0.0, 0.0]])
    places = made_places(states, [(0, 0), (1, 0), (3, 1), (5, 2)])
    places = replace(places, hidden_PD=states)
    wrong = torch.eye(3)
    reports = _reports([record("a"), record("b"), record("c")], places, find_uses(places, wrong, LogitMap()))
    assert [(r.deserved, r.right, r.wrong) for r in reports] == [(2, 2, 1), (1, 1, 1), (1, 0, 0)]
    assert [r.silent for r in reports] == [None, None, "never right at 1 held-out places that deserve it"]
    worse = find_uses(made_places(states, [(0, 0)]), wrong, LogitMap())
    reports = _reports([record("a"), record("b"), record("c")], made_places(states, [(0, 0)]), worse)
    assert reports[0].silent == "wrong at 2 held-out places, right at 1"
    assert reports[1].silent == "no place to judge it by"


def expansion(records: list[TokenSnippets]) -> Expansion:
    return Expansion([made.new_token for made in records], 4)


def fake_model() -> Any:
    weight = torch.arange(12.0).view(4, 3)
    return SimpleNamespace(head_VD=weight, device=torch.device("cpu"), logit_map=LogitMap(), head_bias_V=None)


def test_the_baselines_need_no_text() -> None:
    records = [record("a"), record("b")]
    mean = make_output_rows("mean", records, fake_model(), expansion(records))
    assert mean.output_ND.tolist() == [[4.5, 5.5, 6.5]] * 2
    zero = make_output_rows("zero", records, fake_model(), expansion(records))
    assert 0 < float(zero.output_ND.abs().max()) < 1e-3


@pytest.mark.slow
def test_held_out_places_choose_the_caution_and_silence_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third token that is never deserved gets the silent row; wrong use stays below the bound."""
    places, _ = planted(3_000, 0)
    noise = torch.Generator().manual_seed(5)
    blurred = replace(places, hidden_PD=places.hidden_PD + 4 * torch.randn(3_000, 8, generator=noise))
    monkeypatch.setattr(module, "_windows", lambda *_: ([1], [2]))
    monkeypatch.setattr(module, "_read", lambda *_: blurred)
    monkeypatch.setattr(module, "FIRST_EPOCHS", 40.0)
    monkeypatch.setattr(module, "TRY_EPOCHS", 20.0)
    head_VD = torch.tensor([[2.0], [1.0], [-0.1], [0.05]]) * torch.eye(8)[7]
    model = SimpleNamespace(**{**vars(fake_model()), "head_VD": head_VD})
    records = [TokenSnippets(NewToken(n, n, run)) for n, run in (("a", (1, 2)), ("b", (1, 2, 3)), ("c", (3, 3)))]
    made = make_output_rows("fit", records, model, expansion(records), false_use=0.02)  # type: ignore[arg-type]
    assert made.caution is not None
    assert made.caution > 1
    assert made.held_out is not None
    assert made.held_out.adoption is not None
    assert made.held_out.false_use <= made.bound == 0.02
    assert made.bound_met
    assert made.held_out.adoption > 0.1
    assert [token.silent is None for token in made.tokens] == [True, True, False]
    silent_D, leak, _ = silent_row(model.head_VD, [blurred], 4, LogitMap())
    assert torch.equal(made.output_ND[2], silent_D)
    assert made.leak == pytest.approx(leak, rel=1e-2)
    summary = made.summary()
    assert summary["written"] == 2
    assert [token["token"] for token in summary["silent"]] == ["c"]  # type: ignore[attr-defined]
    quiet = make_output_rows("none", records, model, expansion(records))  # type: ignore[arg-type]
    assert torch.equal(quiet.output_ND[0], quiet.output_ND[2])
    assert not find_uses(blurred, quiet.output_ND, LogitMap()).on_top_P.any()


def test_rows_are_capped_below_what_verify_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure is the longest base row in use, and rounding leaves the cap below the limit of `verify`."""
    places, _ = planted(600, 0)
    monkeypatch.setattr(module, "_windows", lambda *_: ([1], [2]))
    monkeypatch.setattr(module, "_read", lambda *_: places)
    monkeypatch.setattr(module, "_fit", lambda fit, judge, *_: judge(100 * torch.eye(8)[:2], 1.0))
    head_VD = torch.tensor([[2.0], [1.0], [-1.0], [-2.0], [50.0]]) * torch.eye(8)[7]  # the last one is not in use
    model = SimpleNamespace(**{**vars(fake_model()), "head_VD": head_VD})
    records = [TokenSnippets(NewToken(n, n, run)) for n, run in (("a", (1, 2)), ("b", (1, 2, 3)))]
    made = make_output_rows("fit", records, model, expansion(records))  # type: ignore[arg-type]
    assert [token.silent for token in made.tokens] == [None, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for norm in made.output_ND.to(dtype).float().norm(dim=1).tolist():
            assert 0.95 * MAX_NORM_RATIO * 2.0 < norm < 0.99 * MAX_NORM_RATIO * 2.0


class Scripted:
    """A fit whose rows are wrong and adopted as a script says: its rows are the number of trainings."""

    def __init__(self) -> None:
        self.cautions: list[float] = []

    @property
    def rows_ND(self) -> torch.Tensor:
        return torch.full((1, 1), float(len(self.cautions)))

    def steps(self, epochs: float) -> int:
        return 1

    def train(self, epochs: float, caution: float, note: object) -> None:
        self.cautions.append(caution)


def scripted(script: list[tuple[float, float]]) -> tuple[Any, list[float]]:
    """Fit by a script of (wrong use, adoption) after each training; returns what was chosen and all cautions."""
    fit = Scripted()

    def judge(rows_ND: torch.Tensor, caution: float) -> module._Try:
        wrong, adoption = script[int(rows_ND) - 1]
        return module._Try(rows_ND, (), Writing(100, 50, adoption, wrong, 0.0, 0.0, 0, 0), caution)

    made = module._fit(fit, judge, 0.01, no_progress)  # type: ignore[arg-type]
    return made, fit.cautions


def test_the_rows_that_write_most_within_the_bound_are_taken() -> None:
    made, cautions = scripted([(0.07, 0.9), (0.008, 0.4), (0.009, 0.5), (0.012, 0.6)])  # the last training breaks it
    assert (made.writing.adoption, made.writing.false_use, made.caution) == (0.5, 0.009, cautions[2])
    assert len(cautions) == 1 + module.TRIES
    assert cautions[0] == 1.0 < cautions[2] < cautions[1]  # it went back as well


def test_caution_grows_until_the_bound_is_kept() -> None:
    made, cautions = scripted([(0.07, 0.9), (0.03, 0.8), (0.02, 0.7), (0.011, 0.6), (0.0101, 0.5), (0.005, 0.3)])
    assert (made.writing.adoption, made.meets(0.01)) == (0.3, True)
    assert len(cautions) == 1 + module.TRIES + 2
    assert cautions == sorted(cautions)
    assert cautions[-1] >= 1.5**2 * cautions[-3]


def test_rows_that_cannot_keep_the_bound_are_the_nearest_to_it_and_said_to_be() -> None:
    count = 1 + module.TRIES + module.RAISES
    made, cautions = scripted([(0.03, 0.5)] * (count - 2) + [(0.02, 0.4), (0.04, 0.6)])
    assert (made.writing.false_use, made.meets(0.01)) == (0.02, False)
    assert len(cautions) == count


def snippets(per_token: int) -> tuple[list[TokenSnippets], Expansion]:
    rng = np.random.default_rng(0)
    every = Expansion(some_tokens(rng, 4), NUM_BASE)
    texts = [tuple((*rng.integers(0, NUM_BASE, 6).tolist(), NUM_BASE + i) for _ in range(per_token))
             for i in range(every.num_new)]
    return [TokenSnippets(token, some, (6,) * per_token)
            for token, some in zip(every.tokens, texts, strict=True)], every


@pytest.mark.parametrize(("per_token", "places"), [(1, 200), (0, 200), (9, 1)])
@pytest.mark.parametrize("kind", ["fit", "none"])
def test_where_nothing_is_held_out_all_tokens_are_silent(kind: str, per_token: int, places: int) -> None:
    records, every = snippets(per_token)
    model = sharp_model()
    made = make_output_rows(kind, records, model, every, prefix_ids=[3], places_per_token=places)
    assert made.kind == kind
    assert made.output_ND.shape == (len(records), 32)
    assert torch.equal(made.output_ND, model.head_VD[list(made.silent_ids)].float().mean(0).expand(len(records), -1))
    assert made.leak is not None
    assert made.places > 0
    assert [token.silent for token in made.tokens] == (
        ["no place to judge it by"] * len(records) if kind == "fit" else [])


def test_states_are_kept_once_and_stated_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    records, every = snippets(3)
    model, seen = sharp_model(), list[int]()
    monkeypatch.setattr(module, "WINDOWS_AT_ONCE", 2)
    join = module.concatenate

    def counted(parts: list[Places]) -> Places:
        seen.append(sum(part.hidden_PD.nbytes for part in parts))
        return join(parts)

    monkeypatch.setattr(module, "concatenate", counted)
    made = make_output_rows("none", records, model, every, prefix_ids=[3, 4])
    assert seen == [0, 0]  # training and held-out snippets, whose states are in their place already
    stated = module.states_bytes("none", records, model, every, prefix_ids=[3, 4])
    assert stated == made.places * 32 * 8
    assert module.states_bytes("mean", records, model, every) == 0


def test_no_text_that_rows_are_fitted_to_judges_them() -> None:
    """Neither one that is a snippet of two tokens, nor one under two positions, nor a window that overlaps another."""
    records, every = snippets(9)
    rng = np.random.default_rng(1)
    common = [tuple(rng.integers(0, NUM_BASE, 24).tolist()) for _ in range(6)]
    both = [(*text[:12], NUM_BASE, NUM_BASE + 1, *text[12:]) for text in common]
    records[0] = replace(records[0], snippets=tuple(both + both), positions=(12,) * 12)
    records[1] = replace(records[1], snippets=tuple(text[4:] for text in both), positions=(9,) * 6)
    train, held_out = module._windows(records, every, [3], 10_000)
    numbers = text_numbers([ids[1:] for ids in (*train, *held_out)])
    assert len(train) + len(held_out) == sum(len(made.snippets) for made in records)
    assert len(train) > len(held_out) >= len(records)
    assert not set(numbers[: len(train)]) & set(numbers[len(train) :])


def test_a_default_dtype_that_somebody_changed_changes_nothing() -> None:
    """Loading a model in another thread changes it for the whole process."""
    places = made_places(torch.randn(5_000, 16, generator=torch.Generator().manual_seed(0)), [(0, 0), (1, 1)])
    head_VD = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found.append((silent_row(head_VD, [places], 39, LogitMap())[0], fitted(places), rows_in_use(head_VD, 39),
                          find_uses(places, head_VD[:2], LogitMap()).lost_P,
                          mean_rows(head_VD, [NewToken("a", "a", (1, 2))])))
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_places_of_many_batches_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    records, every = snippets(3)
    model, tree = sharp_model(), RunTree.of(every.tokens)
    windows = [every.unmerge(ids) for made in records for ids in made.snippets]
    read = []
    for at_once in (2, 1_000):
        monkeypatch.setattr(module, "WINDOWS_AT_ONCE", at_once)
        read.append(module._read(model, windows, tree, NUM_BASE, 2, no_progress))
    order = [torch.argsort(places.top_P + places.normaliser_P) for places in read]
    assert len(read[0]) == sum(len(window) - 1 for window in windows)
    for name in ("hidden_PD", "top_P", "top_id_P"):
        ours, whole = (getattr(places, name)[at] for places, at in zip(read, order, strict=True))
        assert torch.allclose(ours.double(), whole.double(), atol=1e-9)


def chosen(**options: Any) -> module.OutputChoice:
    facts = {name: options.pop(name) for name in ("architecture", "tied", "biased") if name in options}
    return module.choose_output_rows(DistillConfig(**options), **{
        "architecture": "LlamaForCausalLM", "tied": True, "biased": False, **facts})


def test_what_was_asked_for_is_made_where_the_model_can_have_it() -> None:
    assert chosen() == chosen(output_rows="fit") == module.OutputChoice("fit")
    for kind in ("mean", "zero", "none", "input"):
        assert chosen(output_rows=kind) == module.OutputChoice(kind)
    assert chosen(output_rows="none", biased=True) == module.OutputChoice("none")
    assert chosen(architecture="Gemma2ForCausalLM", tied=False) == module.OutputChoice("fit")
    assert chosen(architecture="Gemma2ForCausalLM", output_rows="input") == module.OutputChoice("input")


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "Gemma3nForCausalLM", "CohereForCausalLM"])
def test_output_rows_that_an_engine_would_not_read_are_refused_or_said_to_be_missing(name: str) -> None:
    for kind in ("fit", "mean", "zero", "none"):
        with pytest.raises(UsageError, match=f"--output-rows is '{kind}', but vLLM ties the head of {name} to its emb"):
            chosen(output_rows=kind, architecture=name)
    fallen = chosen(architecture=name)
    assert fallen.kind == "input"
    assert fallen.why is not None
    assert "no output rows of their own" in fallen.why


def test_other_fallbacks_are_said_or_refused() -> None:
    with pytest.raises(UsageError, match="--output-rows is 'fit', but the head of PhiForCausalLM has a bias"):
        chosen(output_rows="fit", architecture="PhiForCausalLM", tied=False, biased=True)
    fallen = chosen(architecture="PhiForCausalLM", tied=False, biased=True)
    assert (fallen.kind, "read and not written" in str(fallen.why)) == ("none", True)
    assert "is a matrix of its own" in str(chosen(output_rows="input", tied=False).why)
    assert "--method mean makes no output rows" in str(chosen(method="mean").why)
    for kind in ("fit", "zero", "none"):
        with pytest.raises(UsageError, match=f"--output-rows is '{kind}', but --method is 'mean'"):
            DistillConfig(method="mean", output_rows=kind)
    with pytest.raises(UsageError, match="--output-rows is 'some'"):
        DistillConfig(output_rows="some")
