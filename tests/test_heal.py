"""`heal`: its loss against plain formulas, and the folder that it makes."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import every
from tiny_expanded import DOCUMENTS, expanded_pair, patched
from tiny_families import tiny_family
from tiny_run import write_corpus
from tiny_writing import NUM_BASE, sharp_model, some_tokens

from vocabext.api.model import Expanded
from vocabext.checkpoint.folder import open_checkpoint
from vocabext.errors import CorpusError, MissingExtraError, UsageError
from vocabext.heal import train
from vocabext.heal.loss import Head, first_piece_loss, unit_loss
from vocabext.heal.targets import NO_PIECE, UnitShares, unit_targets
from vocabext.heal.text import Batch, sample_documents
from vocabext.model.adapter import load_adapter
from vocabext.model.first_pieces import first_piece_logs
from vocabext.model.frozen import load_model
from vocabext.tokens import Expansion, NewToken

RNG = np.random.default_rng(0)
QUICK: dict[str, Any] = {"text": 480, "window": 40, "batch": 2, "held_out": 2, "rank": 2, "device": "cpu"}


def some_head(num_new: int = 12, cap: float | None = None) -> tuple[Head, torch.Tensor, torch.Tensor]:
    """A head of a random model, output rows, and the first piece of each."""
    model = sharp_model()
    first_N = torch.from_numpy(RNG.integers(0, 6, num_new))
    head = Head.of(model, first_N, NUM_BASE, None)
    if cap is not None:
        head = Head(head.weight_VD, None, None, None, type(head.logit_map)(1.5, cap), head.first_F, head.group_N)
    return head, torch.randn(num_new, 32, dtype=torch.double) * 0.3, first_N


@pytest.mark.parametrize("cap", [None, 4.0])
def test_the_loss_and_its_gradient_are_those_of_the_plain_formula(cap: float | None) -> None:
    head, output_ND, first_N = some_head(cap=cap)
    base_QD = torch.randn(150, 32, dtype=torch.double)
    position_P = torch.tensor(sorted(RNG.choice(150, 110, replace=False)))
    hidden_PD = (base_QD[position_P] + 0.3 * torch.randn(110, 32)).requires_grad_()
    output_ND.requires_grad_()
    weight_P = torch.rand(110)
    loss, kl_P, normaliser_Q = first_piece_loss(hidden_PD, output_ND, base_QD, position_P, weight_P, head)
    found = torch.autograd.grad(loss, (hidden_PD, output_ND))

    base_QV = head.logit_map(base_QD @ head.weight_VD.T)
    logits = torch.cat((head.logit_map(hidden_PD @ head.weight_VD.T), head.logit_map(hidden_PD @ output_ND.T)), 1)
    logs_PV = first_piece_logs(logits, first_N)
    wanted_P = torch.nn.functional.kl_div(logs_PV, torch.log_softmax(base_QV[position_P], 1), log_target=True,
                                          reduction="none").sum(1)
    wanted = torch.autograd.grad((wanted_P * weight_P).sum(), (hidden_PD, output_ND))
    assert torch.allclose(kl_P.double(), wanted_P, atol=1e-4)
    assert torch.allclose(normaliser_Q.double(), base_QV.logsumexp(1), atol=1e-4)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_thinned_head_agrees_with_the_whole_on_average() -> None:
    head, output_ND, _ = some_head()
    base_QD = torch.randn(20, 32, dtype=torch.double)
    often = torch.arange(NUM_BASE) < 20
    hidden_PD = base_QD + 0.1 * torch.randn(20, 32)
    places, weights = torch.arange(20), torch.ones(20) / 20
    whole = float(first_piece_loss(hidden_PD, output_ND, base_QD, places, weights, head)[0])
    generator = torch.Generator().manual_seed(0)
    heads = [head.thinned(often, generator) for _ in range(300)]
    assert {len(some.weight_VD) for some in heads} != {NUM_BASE}
    every = [float(first_piece_loss(hidden_PD, output_ND, base_QD, places, weights, some)[0]) for some in heads]
    everything = head.thinned(torch.ones(NUM_BASE, dtype=torch.bool), generator)
    found = first_piece_loss(hidden_PD, output_ND, base_QD, places, weights, everything)[0]
    assert float(found) == pytest.approx(whole)
    assert abs(np.mean(every) - whole) < 5 * np.std(every) / len(every) ** 0.5 + 0.2 * whole


def test_the_probability_of_a_run_is_followed_along_the_text() -> None:
    tokens = [NewToken("ab", "ab", (1, 2)), NewToken("abc", "abc", (1, 2, 3)), NewToken("ad", "ad", (1, 4))]
    expansion = Expansion(tokens, 10)
    # `ab` before anything but c, `abc` as such: each time the text has the run, it has the token.
    windows = [np.array([0, 10, 5, 11, 12, 5, 10, 6])]
    shares = UnitShares.counted(expansion, windows)
    pieces = torch.tensor([0, 1, 2, 5, NO_PIECE])
    known = {(1, 2): 0.6, (1, 4): 0.3, (2, 3): 0.25}

    def logs(position: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        return torch.tensor([known[int(pieces[p]), int(i)] for p, i in zip(position, piece, strict=True)]).log()

    target_PN, first_P = unit_targets(shares, pieces, torch.tensor([1, 2]), logs)
    assert first_P.tolist() == [1, -1]
    assert target_PN[0].tolist() == pytest.approx([0.6 * 0.75, 0.6 * 0.25, 0.3], abs=1e-5)
    assert target_PN[1].tolist() == [0, 0, 0]


def test_what_the_text_did_not_take_is_estimated_by_how_often_it_ended_so() -> None:
    tokens = [NewToken("abc", "abc", (1, 2, 3))]
    shares = UnitShares.counted(Expansion(tokens, 10), [np.array([0, 10, 0, 1, 2, 5, 0, 10, 0, 1, 2, 7, 0, 5])])
    pieces = torch.tensor([0, 1, 7, NO_PIECE])
    target_PN, _ = unit_targets(shares, pieces, torch.tensor([1]), lambda position, piece: torch.tensor([0.5]).log())
    # Of four times that the text had 1, 2 it had the token twice; one more is assumed, so that nothing is impossible.
    assert float(target_PN) == pytest.approx(0.5 * 3 / 4)


def test_units_at_their_target_cost_nothing_and_pull_nowhere() -> None:
    head, output_ND, first_N = some_head()
    hidden_PD = torch.randn(7, 32, dtype=torch.double)
    first_P = first_N[:7]
    logits_PN = (hidden_PD @ output_ND.T).masked_fill(first_N != first_P[:, None], -torch.inf)
    piece_P = (hidden_PD * head.weight_VD[first_P]).sum(1)
    target_PN = torch.softmax(torch.cat((logits_PN, piece_P[:, None]), 1), 1)[:, :-1].float()
    output_ND.requires_grad_()
    loss = unit_loss(hidden_PD, output_ND, target_PN, first_P, torch.ones(7), head, first_N)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert output_ND.grad is not None
    assert float(output_ND.grad.abs().max()) < 1e-5


def test_places_of_a_batch_have_read_the_same_text_in_both_tokenizations() -> None:
    expansion = Expansion(some_tokens(RNG, 8), NUM_BASE)
    windows = [RNG.integers(0, expansion.end_id, 12) for _ in range(3)]
    batch = Batch.of(windows, expansion)
    flat = batch.pieces_Q.tolist()
    texts = np.split(np.array(flat), np.flatnonzero(np.array(flat) == NO_PIECE) + 1)
    for window, text in zip(windows, texts, strict=False):
        assert text[:-1].tolist() == expansion.unmerge(window).tolist()
    at = batch.position_P.view(3, 12)
    starts = np.cumsum([0, *(len(text) for text in texts)])
    for number, window in enumerate(windows):
        for t in range(12):
            read = flat[starts[number] : int(at[number, t]) + 1]
            assert read == expansion.unmerge(window[: t + 1]).tolist()
    assert batch.base_BL[batch.real_BL].tolist() == [max(0, piece) for piece in flat]


def test_documents_are_drawn_from_all_of_a_sorted_corpus() -> None:
    from vocabext.corpus import Document

    documents = [Document(str(i), f"{i:04d}" * 25) for i in range(400)]
    drawn = [int(text[:4]) for text in sample_documents(documents, 4_000, 0)]
    assert len(drawn) == 40
    assert min(drawn) < 60
    assert max(drawn) > 340
    assert drawn != sorted(drawn)
    assert drawn == [int(text[:4]) for text in sample_documents(documents, 4_000, 0)]


# -- the folder ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, expanded folder, corpus."""
    folder = tmp_path_factory.mktemp("heal")
    base, new = expanded_pair(folder)
    return base, new, write_corpus(folder / "corpus.jsonl", list(DOCUMENTS) * 4)


@pytest.fixture(scope="module")
def healed(pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Expanded:
    base, new, corpus = pair
    return Expanded.load(new, base).heal(str(corpus), tmp_path_factory.mktemp("out") / "healed", **QUICK)


@pytest.mark.slow
def test_the_body_stays_the_bases_bit_for_bit_and_the_rows_are_new(
    pair: tuple[Path, Path, Path], healed: Expanded
) -> None:
    base, before, after = (open_checkpoint(folder) for folder in (pair[0], pair[1], healed.folder))
    rows = set(base.row_tensors)
    assert all(torch.equal(base.read(name), after.read(name)) for name in base.tensors if name not in rows)
    assert any(not torch.equal(before.read(name), after.read(name)) for name in rows)


@pytest.mark.slow
def test_a_healed_folder_passes_verify_and_the_drift_of_its_adapter_is_said(healed: Expanded) -> None:
    found = healed.verify()
    assert found.passed
    drift = next(check for check in found.checks if check.name == "drift with the adapter")
    assert "nats per position" in drift.detail
    assert not list(healed.folder.glob(".*"))


@pytest.mark.slow
def test_a_changed_adapter_fails_verify(healed: Expanded, tmp_path: Path) -> None:
    import shutil

    copy = Expanded(shutil.copytree(healed.folder, tmp_path / "copy"), healed.base)
    path = copy.folder / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 2', '"r": 4'))
    found = {check.name: check for check in copy.verify().checks}
    assert found["drift with the adapter"].verdict == "fail"
    assert "adapter_config.json" in found["drift with the adapter"].detail


@pytest.mark.slow
def test_the_adapter_is_a_plain_peft_folder_and_healing_lowers_the_held_out_loss(healed: Expanded) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(healed.folder)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    load_adapter(load_model(healed.folder, device="cpu", dtype="float32"), healed.folder / "adapter")
    report = json.loads((healed.folder / "heal.json").read_text())
    assert report["curve"][-1]["total"] < report["curve"][0]["total"]
    assert report["sha256"].keys() == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


class _Killed(Exception):  # noqa: N818 - it stands for a signal
    pass


@pytest.mark.slow
def test_a_killed_training_goes_on_with_the_same_result(
    pair: tuple[Path, Path, Path], healed: Expanded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new, corpus = pair
    steps = []
    step = train.Training._one

    def die(self: train.Training) -> float:
        steps.append(self.step)
        if len(steps) == 4:
            raise _Killed
        return step(self)

    monkeypatch.setattr(train.Training, "_one", die)
    monkeypatch.setattr(train, "KEPT_SECONDS", 0.0)
    with pytest.raises(_Killed):
        Expanded.load(new, base).heal(str(corpus), tmp_path / "again", **QUICK)
    again = Expanded.load(new, base).heal(str(corpus), tmp_path / "again", **QUICK)
    assert steps[4] == 3  # not from the beginning
    one, other = (open_checkpoint(expanded.folder) for expanded in (healed, again))
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
    assert (healed.folder / "adapter/adapter_model.safetensors").read_bytes() == (
        again.folder / "adapter/adapter_model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_merged_folder_does_not_claim_to_be_the_base(pair: tuple[Path, Path, Path], healed: Expanded, tmp_path: Path
                                                       ) -> None:
    base, new, corpus = pair
    merged = Expanded.load(new, base).heal(str(corpus), tmp_path / "merged", merge=True, **QUICK)
    checks = {check.name: check for check in merged.verify().checks}
    assert checks["untouched tensors equal"].verdict == "not checked"
    assert "merged" in checks["untouched tensors equal"].detail
    assert checks["drift with the adapter"].detail.startswith("merged")
    assert not (merged.folder / "adapter").exists()
    ids = torch.tensor([[0, 5, merged.expansion.first_new_id, 7]])
    apart = load_model(healed.folder, device="cpu", dtype="float32")
    load_adapter(apart, healed.folder / "adapter")
    together = load_model(merged.folder, device="cpu", dtype="float32")
    with torch.no_grad():
        assert torch.allclose(apart.model(ids).logits, together.model(ids).logits, atol=1e-4)
    with pytest.raises(UsageError, match="merged adapter"):
        merged.heal(str(corpus), tmp_path / "twice", **QUICK)
    with pytest.raises(Exception, match="merged"):
        merged.revert(tmp_path / "back")


def test_too_little_text_is_one_clear_line(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, new, _ = pair
    short = write_corpus(tmp_path / "short.jsonl", [type(DOCUMENTS[0])("a", "the heart")])
    with pytest.raises(CorpusError, match="does not fill two windows of 40 ids"):
        Expanded.load(new, base).heal(str(short), tmp_path / "out", **QUICK)


def test_a_missing_extra_is_named(pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                  ) -> None:
    base, new, corpus = pair
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vocabext\[heal\]'"):
        Expanded.load(new, base).heal(str(corpus), tmp_path / "out", **QUICK)


@pytest.mark.parametrize(("option", "value", "said"), [
    ("rank", 0, "at least 1"), ("general_share", 1.0, "below 1"), ("row_rate", 0.0, "above 0"),
    ("text", 10, "at least one step"), ("objective", "kl", "must be one of"),
])
def test_options_out_of_range_are_refused(
    pair: tuple[Path, Path, Path], tmp_path: Path, option: str, value: object, said: str
) -> None:
    base, new, corpus = pair
    with pytest.raises(UsageError, match=said):
        Expanded.load(new, base).heal(str(corpus), tmp_path / "out", **{**QUICK, option: value})


@pytest.mark.slow
def test_eval_shows_base_mean_distilled_and_healed(healed: Expanded, tmp_path: Path) -> None:
    heldout = write_corpus(tmp_path / "heldout.jsonl", DOCUMENTS[2:])
    options: dict[str, Any] = {"prompts": 1, "continuation": 4, "context": 48, "dtype": "float32", "device": "cpu"}
    found = healed.evaluate(str(heldout), **options).to_json()
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["base", "mean", "distilled", "healed"]
    before = Expanded.load(found_before(healed), healed.base).evaluate(str(heldout), **options).to_json()
    assert rows["base"] == before["rows"][0]
    # Its folder has the rows that the healing began with, and they are read as without an adapter.
    assert rows["distilled"]["bits_per_byte_writing"] == pytest.approx(before["rows"][1]["bits_per_byte_writing"])
    assert rows["healed"]["bits_per_byte_writing"] != rows["distilled"]["bits_per_byte_writing"]
    greedy = found["writing"]["rows"][-1]["greedy"]
    assert greedy["base_nats_per_character"] > 0


def found_before(healed: Expanded) -> str:
    return str(json.loads((healed.folder / "heal.json").read_text())["model"])


@pytest.mark.slow
def test_another_body_that_is_the_base_measures_as_the_base(pair: tuple[Path, Path, Path]) -> None:
    from contextlib import nullcontext

    from vocabext.checkpoint.folder import Rows
    from vocabext.checkpoint.rows import mean_rows
    from vocabext.evaluate.held_out import HeldOut, measure_held_out
    from vocabext.progress import no_progress

    expanded = Expanded.load(pair[1], pair[0])
    model = load_model(pair[0], device="cpu", dtype="float32")
    rows = Rows(mean_rows(model.embedding_VD, expanded.tokens), mean_rows(model.head_VD, expanded.tokens))
    windows = [np.array(expanded.tokenizer.encode(document.text)[:60]) for document in DOCUMENTS]
    held_out = HeldOut(windows, [window[:20] for window in windows], 0, 6, expanded.tokenizer.decode)
    nats, written = measure_held_out(model, expanded.expansion, held_out, {"one": rows, "other": rows}, no_progress,
                                     {"other": lambda: nullcontext(model)})
    assert nats["one"].reading_S == pytest.approx(nats["other"].reading_S, rel=1e-5)
    assert nats["one"].writing_S == pytest.approx(nats["other"].writing_S, rel=1e-5)
    assert written is not None
    one, other = ({key: value for key, value in row.items() if key != "name"} for row in written["rows"])
    assert one["greedy"] == other["greedy"]
    assert one["sampling"]["kl_nats_per_piece"] == pytest.approx(other["sampling"]["kl_nats_per_piece"], abs=1e-4)
    for key in ("places", "merged"):
        assert one[key] == pytest.approx(other[key], abs=1e-4)


@pytest.mark.slow
@every("family", ["gpt2", "gemma2-window", "gemma3-window", "granite", "cohere", "phi", "qwen3-moe", "bloom",
                  "mistral-window"], few=["gpt2", "gemma2-window"])
def test_what_was_trained_is_what_the_folder_computes(tmp_path: Path, family: str) -> None:
    """Scaled, bounded and biased logits, scaled embeddings, windows: the report's curve holds for the real model."""
    base = tiny_family(tmp_path / "base", family)
    new = patched(base, tmp_path)
    corpus = write_corpus(tmp_path / "corpus.jsonl", list(DOCUMENTS) * 4)
    healed = Expanded.load(new, base).heal(str(corpus), tmp_path / "healed", **{**QUICK, "window": 32})
    report = json.loads((healed.folder / "heal.json").read_text())
    curve = [point["total"] for point in report["curve"]]
    assert curve[-1] < curve[0]
    plain, own = (load_model(folder, device="cpu", dtype="float32", runs=False) for folder in (base, healed.folder))
    load_adapter(own, healed.folder / "adapter")
    expansion = healed.expansion
    first_N = torch.tensor([token.run[0] for token in expansion.tokens])
    ids = np.array([*range(40, 60), *range(expansion.first_new_id, expansion.end_id)])
    at = torch.from_numpy(expansion.last_positions(ids))
    with torch.no_grad():
        base_TV = plain.model(torch.from_numpy(expansion.unmerge(ids))[None]).logits[0, at, : expansion.first_new_id]
        own_TU = own.model(torch.from_numpy(ids)[None]).logits[0, :, : expansion.end_id]
    wanted = torch.nn.functional.kl_div(first_piece_logs(own_TU, first_N), torch.log_softmax(base_TV, 1),
                                        log_target=True, reduction="none").sum(1)
    rows = open_checkpoint(healed.folder)
    new_rows = slice(expansion.first_new_id, expansion.end_id)
    frozen = load_model(base, device="cpu", dtype="float32")
    load_adapter(frozen, healed.folder / "adapter")
    biases = [name for name, tensor in rows.row_tensors.items() if tensor.role == "head bias"]
    head = Head.of(frozen, first_N, expansion.first_new_id, rows.read(biases[0])[new_rows] if biases else None)
    with torch.no_grad():
        hidden_TD = frozen.hidden(frozen.embed(torch.from_numpy(ids)[None], rows.read(rows.vocab_tensors[0])[new_rows],
                                               expansion.first_new_id))[0]
    logits_TV = head.base_logits(hidden_TD)
    assert torch.allclose(logits_TV, own_TU[:, : expansion.first_new_id], atol=1e-3)
    output_ND = rows.read(rows.vocab_tensors[-1])[new_rows]
    assert torch.allclose(head.new_logits(hidden_TD, output_ND), own_TU[:, expansion.first_new_id :], atol=1e-3)
    assert bool((wanted >= 0).all())


@pytest.mark.fuzz
def test_a_model_that_peft_cannot_adapt_is_refused_in_one_line(tmp_path: Path) -> None:
    base = tiny_family(tmp_path / "base", "mamba")
    new = patched(base, tmp_path)
    corpus = write_corpus(tmp_path / "corpus.jsonl", list(DOCUMENTS) * 4)
    with pytest.raises(UsageError, match=r"peft cannot adapt MambaForCausalLM: .*incompatible with Mamba"):
        Expanded.load(new, base).heal(str(corpus), tmp_path / "healed", **{**QUICK, "window": 32})
    assert not (tmp_path / "healed").exists()
