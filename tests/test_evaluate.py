"""The measures of `eval`: the branches are exact, and a perfect row recovers the whole gap."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import tiny_folder, tiny_model
from tiny_expanded import DOCUMENTS, expanded_pair, new_tokens, patched
from tiny_families import tiny_family

from vocabext.checkpoint.folder import Rows, save_rows
from vocabext.checkpoint.rows import mean_rows
from vocabext.corpus import Document
from vocabext.distill import distill_file
from vocabext.errors import CorpusError, UsageError
from vocabext.evaluate.stage import (
    RowSet,
    _expanded_nats,
    _gap_recovered,
    _lay_out,
    _Sums,
    _windows,
    evaluate,
    evaluate_folder,
)
from vocabext.files.jsonl import write_jsonl
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.model.places import find_places
from vocabext.model.run_tree import RunTree
from vocabext.model.writing import find_uses
from vocabext.options import DistillConfig, EvalConfig
from vocabext.patch.stage import patch
from vocabext.tokenizer import extend, load_tokenizer
from vocabext.tokens import TokenSnippets


def test_branches_predict_every_piece_from_merged_context(tmp_path: Path) -> None:
    """Compare one pass with branches against one forward pass per predicted piece."""
    folder = tiny_folder(tmp_path / "base")
    base, model = load_tokenizer(folder), load_model(folder, device="cpu", dtype="float32")
    tokens = new_tokens(folder)
    expanded = extend(base, tokens)
    rows = RowSet("mean", mean_rows(model.embedding_VD, tokens), mean_rows(model.head_VD, tokens))
    text = "so the heart and a muscle of the rest are rated by the heart"
    ids = expanded.encode(text)
    assert expanded.expansion.is_new(ids).sum() >= 3
    (window,) = _windows(0, ids, text, expanded, base, EvalConfig())
    reading, writing = _expanded_nats(model, window, expanded, base, rows)

    def nats(context: list[int], target: int, output: torch.Tensor | None) -> float:
        inputs = model.embed(torch.tensor([context]), rows.input_ND, expanded.first_new_id)
        logs = model.log_probabilities(model.hidden(inputs)[0, -1:], first_new_id=base.first_new_id, new_rows_ND=output)
        return -float(logs[0, target])

    wanted_reading = wanted_writing = 0.0
    for at in range(1, len(ids)):
        wanted_writing += nats(ids[:at], ids[at], rows.output_ND)
        run = expanded.expansion.unmerge([ids[at]]).tolist()
        wanted_reading += sum(nats([*ids[:at], *run[:k]], run[k], None) for k in range(len(run)))
    assert reading == pytest.approx(wanted_reading, rel=1e-4)
    assert writing == pytest.approx(wanted_writing, rel=1e-4)


def test_a_branch_sees_nothing_of_its_own_token_or_later() -> None:
    class Tokenizer:
        from vocabext.tokens import Expansion, NewToken

        expansion = Expansion([NewToken("abc", "abc", (1, 2, 3))], 10)

    layout = _lay_out(np.asarray([5, 10, 6]), 1, Tokenizer())  # type: ignore[arg-type]
    assert layout.ids.tolist() == [5, 10, 6, 1, 2]
    assert layout.positions.tolist() == [0, 1, 2, 1, 2]
    assert layout.visible.astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    assert list(zip(layout.sources.tolist(), layout.targets.tolist(), strict=True)) == [(0, 1), (3, 2), (4, 3), (1, 6)]


def test_windows_cover_a_document_once_and_count_its_bytes(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    base = load_tokenizer(folder)
    expanded = extend(base, new_tokens(folder))
    text = DOCUMENTS[0].text
    ids = expanded.encode(text)
    windows = list(_windows(0, ids, text, expanded, base, EvalConfig(context=16)))
    assert np.concatenate([w.expanded[w.num_prefix:] for w in windows]).tolist() == ids
    assert sum(w.num_bytes for w in windows) == pytest.approx(len(text.encode()), abs=len(windows))
    assert max(len(expanded.expansion.unmerge(w.expanded)) for w in windows) <= 16


def test_the_gap_is_measured_between_mean_and_base() -> None:
    def sums(*nats: float) -> _Sums:
        return _Sums(np.asarray(nats), np.asarray(nats))

    gap, interval = _gap_recovered({"base": sums(10, 20), "mean": sums(20, 40), "distilled": sums(11, 22)})
    assert gap == pytest.approx(0.9)
    assert interval == pytest.approx([0.9, 0.9])
    assert _gap_recovered({"base": sums(10), "mean": sums(9), "distilled": sums(9)}) == (None, None)


def test_the_base_row_is_the_base_model(tmp_path: Path) -> None:
    base, folder = expanded_pair(tmp_path)
    result = evaluate_folder(folder, str(base), DOCUMENTS, EvalConfig(prompts=2, continuation=4, context=64,
                                                                      dtype="float32", device="cpu"))
    rows = {row["name"]: row for row in result["rows"]}  # type: ignore[attr-defined]
    assert list(rows) == ["base", "mean"]  # made with --method mean: no third row
    assert rows["base"]["bits_per_byte"] == rows["base"]["bits_per_byte_writing"]
    assert rows["base"]["greedy_same_share"] == 1.0
    assert rows["mean"]["tokens"] < rows["base"]["tokens"]
    assert (folder / "eval.json").is_file()


def test_the_gap_of_real_rows_follows_from_their_bits_per_byte(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    base, model = load_tokenizer(folder), load_model(folder, device="cpu", dtype="float32")
    tokens = new_tokens(folder)
    mean = mean_rows(model.embedding_VD, tokens)
    # A random model predicts nothing, so that any rows do: rows of another sign and size are off in some way.
    rows = [RowSet("mean", -50 * mean, mean), RowSet("distilled", mean, mean)]
    result = evaluate(DOCUMENTS, model, base, extend(base, tokens), rows, EvalConfig(prompts=0, context=64))
    bits = {row["name"]: row["bits_per_byte"] for row in result["rows"]}  # type: ignore[attr-defined]
    assert len(set(bits.values())) == 3
    expected = (bits["mean"] - bits["distilled"]) / (bits["mean"] - bits["base"])
    assert bits["mean"] > bits["base"]
    assert result["gap_recovered"] == pytest.approx(expected, rel=1e-6)


def test_text_too_short_to_measure_is_refused(tmp_path: Path) -> None:
    base, folder = expanded_pair(tmp_path)
    with pytest.raises(CorpusError, match="held-out"):
        evaluate_folder(folder, str(base), [Document("d", "a")], EvalConfig(dtype="float32"))


def test_another_model_than_the_base_is_refused(tmp_path: Path) -> None:
    base, folder = expanded_pair(tmp_path)
    other = tiny_folder(tmp_path / "other", num_ids=280)
    with pytest.raises(UsageError, match=f"was made from {base} with 290 token ids, but {other} has 280; pass"):
        evaluate_folder(folder, str(other), DOCUMENTS, EvalConfig(dtype="float32"))
    assert not (folder / "eval.json").exists()


@pytest.mark.slow
@torch.no_grad()
def test_new_entries_of_a_bias_count_as_in_the_real_model(tmp_path: Path) -> None:
    """Rows that are not written on a head with a bias: their logits are what the patched folder computes."""
    base = tiny_family(tmp_path / "base", "phi")
    tokens, model = new_tokens(base), load_model(base, device="cpu", dtype="float32")
    mean = mean_rows(model.embedding_VD, tokens)
    facts = {"model": str(base), "num_used_ids": 290, "hidden_size": 64, "tokenizer_sha256": None}
    save_rows(tmp_path / "rows.safetensors", tokens, Rows(mean, 1e-4 * mean), {
        "base": facts, "method": "distill", "options": {}, "writing": {"kind": "none"}})
    folder = tmp_path / "expanded"
    patch(tmp_path / "rows.safetensors", str(base), folder)
    config = EvalConfig(prompts=2, continuation=8, context=64, dtype="float32", device="cpu")
    found = evaluate_folder(folder, str(base), DOCUMENTS, config)["writing"]["rows"]  # type: ignore[index]
    rows = {row["name"]: row for row in found}
    assert rows["distilled"]["greedy"]["new_tokens"] == 0
    assert rows["distilled"]["sampling"]["kl_nats_per_piece"] == pytest.approx(0.0, abs=1e-6)
    assert rows["distilled"]["places"]["nll_rise_everywhere_nats"] == rows["distilled"]["places"]["false_use"] == 0
    assert rows["mean"]["places"]["nll_rise_everywhere_nats"] > 1e-4

    whole, new = load_model(folder, device="cpu", dtype="float32"), slice(290, 290 + len(tokens))
    ids = torch.tensor([load_tokenizer(base).encode("the heart of the muscle")])
    states = model.hidden(model.embed(ids))[0]
    assert whole.head_bias_V is not None
    wanted = whole.logits(whole.hidden(whole.embed(ids))[0], first_new_id=new.stop)
    bias_N = whole.head_bias_V[new]
    assert bool((bias_N == -10_000).all())
    logits = model.logits(states, first_new_id=290, new_rows_ND=whole.head_VD[new], new_bias_N=bias_N)
    assert torch.allclose(logits, wanted, atol=1e-4)
    places = find_places(model, [ids[0].numpy()], RunTree.of(tokens), first_new_id=290)
    ahead_P = find_uses(places, whole.head_VD[new], whole.logit_map, bias_N).ahead_P
    assert torch.allclose(ahead_P, wanted[:, new].amax(1) - wanted[:, :290].amax(1), atol=2e-3)


@pytest.mark.slow
def test_a_model_that_is_offloaded_is_measured_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_folder(tmp_path / "base")
    tiny_model(layers=3).save_pretrained(base)
    folder = patched(base, tmp_path)
    loaded: list[FrozenModel] = []

    def load(*inputs: Any, **options: Any) -> FrozenModel:
        loaded.append(load_model(*inputs, **options))
        return loaded[-1]

    monkeypatch.setattr("vocabext.evaluate.stage.load_model", load)
    found = []
    for limits in (None, "cpu=150KB"):
        config = EvalConfig(prompts=2, continuation=4, context=64, dtype="float32", device="cpu", max_memory=limits)
        found.append(evaluate_folder(folder, str(base), DOCUMENTS, config))
    assert [model.offloaded for model in loaded] == [False, True]
    assert found[1]["options"]["max_memory"] == "cpu=150KB"  # type: ignore[index]
    for ours, whole in zip(found[1]["rows"], found[0]["rows"], strict=True):  # type: ignore[call-overload]
        assert ours["bits_per_byte_writing"] == pytest.approx(whole["bits_per_byte_writing"], rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expanded", "rows.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_a_model_that_looks_up_token_ids_in_its_layers_is_refused(tmp_path: Path, family: str) -> None:
    base = tiny_family(tmp_path / "base", family)
    write_jsonl(tmp_path / "snippets.jsonl", "snippets", {}, [TokenSnippets(t).to_json() for t in new_tokens(base)])
    rows, folder = tmp_path / "rows.safetensors", tmp_path / "expanded"
    with pytest.raises(UsageError, match="has hidden_size_per_layer_input 16: its layers look up token ids"):
        distill_file(tmp_path / "snippets.jsonl", str(base), rows, DistillConfig(dtype="float32", device="cpu"))
    # The mean of the pieces needs no run of the model.
    config = DistillConfig(method="mean", dtype="float32", device="cpu")
    distill_file(tmp_path / "snippets.jsonl", str(base), rows, config)
    patch(rows, str(base), folder)
    with pytest.raises(UsageError, match="so distill and eval cannot run it on new rows; `distill --method mean`"):
        evaluate_folder(folder, str(base), DOCUMENTS, EvalConfig(dtype="float32", device="cpu"))
    assert not (folder / "eval.json").exists()
