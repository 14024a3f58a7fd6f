"""The measures of `eval`: the branches are exact, and a perfect row recovers the whole gap."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import former_eval as former
import numpy as np
import pytest
import torch
from tiny_checkpoints import tiny_folder, tiny_model
from tiny_expanded import DOCUMENTS, expanded_pair, new_tokens, patched
from tiny_families import tiny_family
from tiny_writing import NUM_BASE, random_rows, sharp_model, some_tokens

from vocabext.checkpoint.folder import Rows, save_rows
from vocabext.checkpoint.rows import mean_rows
from vocabext.corpus import Document
from vocabext.distill import distill_file
from vocabext.errors import CorpusError, UsageError
from vocabext.evaluate import reading as model_reading
from vocabext.evaluate.decode import Begun, write_on
from vocabext.evaluate.held_out import HeldOut, measure_held_out
from vocabext.evaluate.reading import lay_out, read_merged
from vocabext.evaluate.stage import (
    RowSet,
    _gap_recovered,
    _Sums,
    _windows,
    evaluate,
    evaluate_folder,
)
from vocabext.files.jsonl import write_jsonl
from vocabext.model import places as model_places
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.model.places import find_places
from vocabext.model.run_tree import RunTree
from vocabext.model.writing import find_uses, measure_writing
from vocabext.options import DistillConfig, EvalConfig
from vocabext.patch.stage import patch
from vocabext.progress import no_progress
from vocabext.tokenizer import extend, load_tokenizer
from vocabext.tokens import Expansion, NewToken, TokenSnippets


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
    places = find_places(model, [expanded.expansion.unmerge(window.expanded)], RunTree.of(tokens),
                         first_new_id=base.first_new_id)
    found = read_merged(model, [window.expanded], 1, expanded.expansion, Rows(rows.input_ND, rows.output_ND), places)
    reading, writing = float(found.reading_nats_S[0]), float(found.writing_nats_S[0])

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
    layout = lay_out(np.asarray([5, 10, 6]), 1, Expansion([NewToken("abc", "abc", (1, 2, 3))], 10))
    assert layout.ids.tolist() == [5, 10, 6, 1, 2]
    assert layout.positions.tolist() == [0, 1, 2, 1, 2]
    assert layout.visible.astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    assert layout.reading.tolist() == [1, 6, -1, 2, 3]
    assert layout.writing.tolist() == [10, 6, -1, -1, -1]


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_the_shared_passes_give_the_numbers_of_a_pass_per_window_and_text(num_prefix: int) -> None:
    """Compare with how each number was computed on its own: one window or text at a time, its logits anew."""
    model, rng = sharp_model(), np.random.default_rng(0)
    begin = Begun(model, [rng.integers(0, NUM_BASE, 6)], Expansion(some_tokens(rng, 1), NUM_BASE), None)
    greedy = begin.write(12)[0].pieces  # of which some runs are what base writes there
    runs = {*(token.run for token in some_tokens(rng, 4)), tuple(greedy[2:4]), tuple(greedy[6:9])}
    tokens = [NewToken(str(run), str(run), run) for run in sorted(runs)]
    expansion, tree = Expansion(tokens, NUM_BASE), RunTree.of(tokens)
    windows = [rng.integers(0, expansion.end_id, size) for size in (9, 30, 4, 17)] + [np.asarray(greedy)]
    prompts = [rng.integers(0, expansion.end_id, size) for size in (5, 8, 3)]
    row_sets = {name: random_rows(model, len(tokens), loud) for name, loud in (("mean", 0.3), ("distilled", 1.0))}
    held_out = HeldOut(windows, prompts, num_prefix, 10, lambda ids: " ".join(map(str, expansion.unmerge(ids))))
    nats, written = measure_held_out(model, expansion, held_out, row_sets, no_progress)
    assert written is not None
    tokenizer = SimpleNamespace(expansion=expansion, first_new_id=NUM_BASE)
    of_base = [former.base_nats(model, expansion.unmerge(w), num_prefix, tokenizer) for w in windows]
    assert nats["base"].reading_S == pytest.approx(of_base, rel=1e-6)
    base_prompts = expansion.unmerge_batch(prompts)
    own = [Begun(model, [p], expansion, None).write(10)[0] for p in base_prompts]
    generator = torch.Generator().manual_seed(0)
    sampled = Begun(model, base_prompts, expansion, None).write(10, generator)
    for found, (name, rows) in zip(written["rows"], row_sets.items(), strict=True):
        both = [former.expanded_nats(model, SimpleNamespace(expanded=w, num_prefix=num_prefix), tokenizer, tokenizer,
                                     rows) for w in windows]
        assert nats[name].reading_S == pytest.approx([reading for reading, _ in both], rel=1e-6)
        assert nats[name].writing_S == pytest.approx([writing for _, writing in both], rel=1e-6)
        places = find_places(model, expansion.unmerge_batch(windows), tree, first_new_id=NUM_BASE,
                             first=max(0, num_prefix - 1))
        merged = former.as_read(places, model, windows, expansion, rows)
        lengths_N = torch.tensor([len(token.run) for token in tokens])
        for key, every in (("places", places), ("merged", merged)):
            uses = find_uses(every, rows.output_ND, model.logit_map)
            plain = {k: v for k, v in measure_writing(every, uses, lengths_N).to_json().items() if v is not None}
            assert {k: v for k, v in found[key].items() if v is not None} == pytest.approx(plain, rel=1e-5)
            assert len(plain) > 6
        texts = [write_on(model, [p], expansion, rows, num_pieces=10)[0] for p in prompts]
        wanted = [former.text_nats(model, base_prompts[b], text.pieces, NUM_BASE) for b, text in enumerate(texts)]
        losses = {(e["prompt"], e["expanded"]): e["lost_nats_per_character"] for e in found["greedy"]["examples"]}
        for b, text in enumerate(texts):
            said = held_out.decode(text.ids), held_out.decode(own[b].ids)
            base = former.text_nats(model, base_prompts[b], own[b].pieces, NUM_BASE)
            key = (held_out.decode(prompts[b]), said[0])
            assert losses.pop(key) == pytest.approx(wanted[b] / len(said[0]) - base / len(said[1]), abs=1e-6)
        assert not losses
        kl = sum(former.former_lost(model, np.concatenate((p, some.pieces)), len(p), tree, rows.output_ND, NUM_BASE,
                                    None) for p, some in zip(base_prompts, sampled, strict=True))
        assert found["sampling"]["kl_nats_per_piece"] == pytest.approx(kl / 30, rel=1e-5)


def test_a_position_goes_through_the_model_once_for_each_row_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading without prompts: base ids once, merged ids and branches once per row set, and their logits once."""
    model, rng = sharp_model(), np.random.default_rng(0)
    tokens = some_tokens(rng, 6)
    expansion = Expansion(tokens, NUM_BASE)
    windows = [rng.integers(0, expansion.end_id, 12) for _ in range(5)]
    ran = Counter[str]()
    assert model.takes_branches
    assert model.logit_map.cap is None  # both are tried once, on a short text
    model.model.get_decoder().layers[0].register_forward_pre_hook(
        lambda _, args, named: ran.update(body=int(np.prod((args or [named["hidden_states"]])[0].shape[:2]))),
        with_kwargs=True)
    model.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: ran.update(head=len(args[0])))
    row_sets = {name: random_rows(model, len(tokens)) for name in ("mean", "distilled")}
    monkeypatch.setattr(model_reading, "POSITIONS_AT_ONCE", 1)  # no padding
    monkeypatch.setattr(model_places, "WINDOW_POSITIONS", 1)
    measure_held_out(model, expansion, HeldOut(windows, [], 1, 4, str), row_sets, no_progress)
    merged = sum(len(lay_out(window, 1, expansion).ids) for window in windows)
    assert ran["body"] == ran["head"] == sum(len(expansion.unmerge(w)) for w in windows) + 2 * merged


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
