"""The benchmark against the reference: its step, its measures, its counts, and that it runs and prints its tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import tiny_folder, tiny_model
from tiny_expanded import DOCUMENTS, new_tokens

from vocabext.checkpoint.rows import mean_rows
from vocabext.collect import collect
from vocabext.evaluate.stage import RowSet
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.options import CollectConfig, DistillConfig
from vocabext.tokenizer import extend, load_tokenizer
from vocabext.tokens import Expansion, NewToken, TokenSnippets

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
CPU = torch.device("cpu")
EXPANSION = Expansion([NewToken("ab", "ab", (1, 2)), NewToken("cde", "cde", (3, 4, 5))], 290)
RECORDS = [TokenSnippets(EXPANSION.tokens[0], ((7, 290, 291, 8), (290, 9)), (1, 0)),
           TokenSnippets(EXPANSION.tokens[1], ((6, 291, 290),), (1,))]


@pytest.fixture(autouse=True)
def benchmarks_at_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("machine.PEAK_SECONDS", 0.02)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models wait for each other's threads more than they compute
    yield
    torch.set_num_threads(threads)


def frozen(**options: Any) -> FrozenModel:
    return FrozenModel(tiny_model(**options), CPU, torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model, and text to mine and to hold out, beside each other."""
    model = tiny_folder(tmp_path / "model")
    for name, numbers in (("mining", range(4)), ("heldout", range(4, 5))):
        lines = (json.dumps({"text": f"{document.text} {i}"}) for document in DOCUMENTS for i in numbers)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return model


def options(folder: Path) -> list[str]:
    return ["--model", str(folder), "--corpus", str(folder.parent / "mining.jsonl"), "--device", "cpu",
            "--heldout", str(folder.parent / "heldout.jsonl"), "--tokens", "4", "--snippets", "6", "--min-count", "2"]


# -- the reference's step ---------------------------------------------------------------------------------------------


def test_the_reference_merges_all_new_tokens_and_aligns_by_the_last_piece() -> None:
    from reference_step import lay_out

    everything, own = (lay_out(RECORDS, EXPANSION, [0], merged)[0] for merged in ("all", "own"))
    assert everything.student.tolist() == [0, 7, 290, 291, 8]
    assert everything.teacher.tolist() == own.teacher.tolist() == [0, 7, 1, 2, 3, 4, 5, 8]
    assert everything.aligned.tolist() == [0, 1, 3, 6, 7]
    assert own.student.tolist() == [0, 7, 290, 3, 4, 5, 8]


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_moves_the_rows_of_its_tokens_by_the_step_size_and_no_others(tied: bool) -> None:
    from reference_step import ReferenceConfig, ReferenceTrainer, lay_out

    model = frozen(tied=tied, num_rows=290)
    before = model.embedding_VD.detach().clone()
    trainer = ReferenceTrainer(model, EXPANSION, ReferenceConfig())
    starts, outputs = trainer.rows()
    assert torch.equal(starts, mean_rows(before, EXPANSION.tokens))
    trainer.step(lay_out(RECORDS[:1], EXPANSION, [0], "own"))  # of the new tokens, only the first is read
    rows, output_rows = trainer.rows()
    # The first step of Adam has the length of the step size in every element; decay is a hundredth of it.
    assert (rows[0] - starts[0]).abs().min() > 0.9e-4
    assert (rows - starts).abs().max() < 1.1e-4
    assert torch.allclose(rows[1], starts[1], rtol=2e-6)
    assert torch.allclose(model.embedding_VD[:290], before, rtol=2e-6, atol=0)
    # Output rows of their own learn from the next token; they are in every softmax.
    assert torch.equal(output_rows, rows) if tied else (output_rows[1] - outputs[1]).abs().min() > 0.9e-4


def test_the_epoch_reads_every_snippet_once_and_lowers_the_error() -> None:
    from reference_step import ReferenceConfig, lay_out, run_reference, schedule

    pairs = lay_out(RECORDS * 20, EXPANSION, [0], "all")
    config = ReferenceConfig(batch_snippets=4, learning_rate=1e-2)
    batches = schedule(pairs, config)
    assert sorted(id(pair) for batch in batches for pair in batch) == sorted(map(id, pairs))
    snapshots = run_reference(pairs, frozen(), EXPANSION, config)
    assert [snapshot.share for snapshot in snapshots] == pytest.approx([2 / 15, 4 / 15, 8 / 15, 1])
    assert [s.seconds for s in snapshots] == sorted(s.seconds for s in snapshots)

    def error(rows_ND: torch.Tensor) -> float:
        model, total = frozen(), 0.0
        for pair in pairs:
            target = model.hidden(model.embed(torch.from_numpy(pair.teacher)[None]))[0][pair.aligned]
            hidden = model.hidden(model.embed(torch.from_numpy(pair.student)[None], rows_ND, 290))[0]
            total += float((hidden - target).square().mean())
        return total

    assert error(snapshots[-1].input_ND) < 0.7 * error(mean_rows(frozen().embedding_VD, EXPANSION.tokens))


# -- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_counted_work_of_the_reference_is_the_computed_one(tied: bool) -> None:
    from reference_step import ReferenceConfig, ReferenceTrainer, lay_out
    from work import BodyShape, WorkCounter, reference_work

    model = frozen(layers=2, tied=tied)
    trainer = ReferenceTrainer(model, EXPANSION, ReferenceConfig())
    batch = lay_out(RECORDS, EXPANSION, [0], "all")
    with WorkCounter(model) as counter:
        trainer.step(batch)
    body, head = reference_work(BodyShape.of(model), [batch], len(model.embedding_VD), tied=tied)
    assert counter.body == body
    assert counter.flops["head", "forward"] + counter.flops["other", "backward"] == head


def test_products_of_inference_mode_and_of_the_way_back_are_counted() -> None:
    from work import BodyShape, WorkCounter

    model = frozen(layers=2)
    shape = BodyShape.of(model)
    ids = torch.arange(7)[None]
    with WorkCounter(model) as counter, torch.inference_mode():
        model.hidden(model.embed(ids))
    assert counter.flops == {("body", "forward"): shape.linear(7, 2), ("attention", "forward"): shape.attention(49, 2)}
    rows_ND = torch.randn(3, 64, requires_grad=True)
    with WorkCounter(model) as counter:
        torch.autograd.grad(model.hidden(model.embed(ids, rows_ND, 4)).sum(), rows_ND)
    assert counter.flops["body", "backward"] == counter.flops["body", "forward"] == shape.linear(7, 2)


def test_the_floor_reads_before_the_token_once() -> None:
    from work import BodyShape, floor_of

    shape = BodyShape(layers=3, layer_weights=10, attention_width=2, hidden=4, inner=8, rows=300)
    records = [RECORDS[0], RECORDS[1]]  # the first is shown nothing
    floor = floor_of(shape, records, EXPANSION, 1, layer=2, shown=[0, 8], epochs=4)
    # The teacher reads <prefix> 6 3 4 5 1 2, the student 291 1 2 behind two positions that it shares.
    assert floor.teacher == 2 * 10 * 2 * 7 + 4 * 2 * 2 * (7 * 8 // 2)
    assert floor.student == 8 * (2 * (2 * 10 * 2 * 3) + 3 * 4 * 2 * 2 * (3 + 4 + 5))
    near = floor_of(shape, records, EXPANSION, 1, layer=2, shown=[0, 2], epochs=4, reach=1)
    # Only 291 1 is compared.
    assert near.teacher == 2 * 10 * 2 * 6 + 4 * 2 * 2 * (6 * 7 // 2)
    assert near.student == 2 * (2 * (2 * 10 * 2 * 2) + 3 * 4 * 2 * 2 * (3 + 4))


# -- measures ---------------------------------------------------------------------------------------------------------


def test_the_hidden_error_is_that_of_all_positions_from_the_first_new_token_on(tmp_path: Path) -> None:
    from quality import hidden_errors

    folder = tiny_folder(tmp_path / "base")
    base, model = load_tokenizer(folder), load_model(folder, device="cpu", dtype="float32")
    tokens = new_tokens(folder)
    expanded = extend(base, tokens)
    rows_ND = mean_rows(model.embedding_VD, tokens)
    found = hidden_errors(DOCUMENTS[:1], model, base, expanded, [RowSet("mean", rows_ND, rows_ND)], 10_000)
    ids = expanded.encode(DOCUMENTS[0].text)
    first = int(expanded.expansion.is_new(ids).argmax())
    assert first > 0
    target = model.hidden(model.embed(torch.tensor([expanded.expansion.unmerge(ids).tolist()])))[0]
    hidden = model.hidden(model.embed(torch.tensor([ids]), rows_ND, expanded.first_new_id))[0]
    target = target[expanded.expansion.last_positions(ids)]
    error = (hidden - target)[first:].square().mean()
    assert found["mean"][0] == pytest.approx(float(error), rel=1e-4)
    assert found["mean"][1] == pytest.approx(float(error / target[first:].square().mean()), rel=1e-4)
    assert float((hidden - target)[:first].abs().max()) < 1e-5


def test_the_gap_begins_at_the_first_rows_and_ends_at_the_base(tmp_path: Path) -> None:
    from quality import measure

    folder = tiny_folder(tmp_path / "base")
    base, model = load_tokenizer(folder), load_model(folder, device="cpu", dtype="float32")
    tokens = new_tokens(folder)
    mean_ND = mean_rows(model.embedding_VD, tokens)
    # A random model predicts nothing, so that any rows do: rows of another sign and size are off in some way.
    rows = [RowSet("wrong", -50 * mean_ND, mean_ND), RowSet("right", mean_ND, mean_ND)]
    found = measure(DOCUMENTS, model, base, extend(base, tokens), rows, 10_000)
    wrong, right, nothing = (found[name].nll_nats for name in ("wrong", "right", "base"))
    assert found["wrong"].gap_recovered == 0
    assert found["base"].gap_recovered == 1
    assert found["right"].gap_recovered == pytest.approx((wrong - right) / (wrong - nothing))
    assert found["base"].hidden_error == 0 < found["right"].hidden_error < found["wrong"].hidden_error


@pytest.mark.slow
def test_the_memory_of_a_block_is_its_own() -> None:
    from machine import MIB, PeakMemory

    with PeakMemory(CPU) as large:
        ones = np.ones(256 * MIB // 8)
        del ones
    with PeakMemory(CPU) as small:
        pass
    # Freed memory that the process still holds may be taken first: the rise is then smaller than the array.
    assert 192 * MIB < large.rise_bytes < 320 * MIB
    assert small.rise_bytes < 32 * MIB


def test_a_stopped_clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    import machine

    now = [0.0]
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])
    clock = machine.Clock(CPU)
    now[0] = 5.0
    with clock.stopped() as (seconds, _):
        now[0] = 50.0
    now[0] = 51.0
    assert (seconds, clock.read()[0]) == (5.0, 6.0)


# -- the whole script -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_compares_both_and_prints_its_tables(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import distill_reference
    from distill_reference import main

    expected = distill_reference._expected_seconds
    # As if ours had taken a millisecond by default, on whatever machine: only what takes far longer is left out.
    monkeypatch.setattr(distill_reference, "_expected_seconds", lambda budget, ours, snippets: expected(
        budget, replace(ours, seconds=1e-3), snippets))
    main([*options(folder), "--ours", "snippets=4,epochs=1", "epochs=5000",
          "-o", str(tmp_path / "result.json")])
    printed, notes = capsys.readouterr()
    assert "ours, epochs=5000: left out" in notes
    assert "| base |" in printed
    assert "| mean |" in printed
    assert "| reference, 1 epoch |" in printed
    assert "| ours, snippets=4,epochs=1 |" in printed
    assert "the floor, at peak" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    quality = result["quality"]
    assert quality["base"]["hidden_error"] == 0
    assert 0 < quality["ours, defaults"]["hidden_error"] < quality["mean"]["hidden_error"]
    work = result["work"]["ours"]
    assert 0 < work["floor_teacher_flops"] + work["floor_student_flops"] <= work["body_flops"]
    assert [run["seconds"] > 0 for run in result["runs"]] == [True] * len(result["runs"])


@pytest.mark.slow
def test_it_shows_time_and_memory_part_by_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distill_reference import main

    main([*options(folder), "--scale", "3"])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "distilling" in line]
    assert len(lines) > 3
    assert min(int(line[2]) for line in lines) > 0


@pytest.mark.slow
def test_it_runs_on_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    from distill_reference import main

    main(["--random-model", "tiny", "--tokens", "3", "--snippets", "3", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "Llama tiny with random weights" in printed
    assert "MFU" in printed


def test_random_snippets_are_windows_of_the_same_length_that_hold_their_token() -> None:
    from distill_reference import random_records

    records = random_records(4, 5, 100)
    expansion = Expansion([record.new_token for record in records], 100)
    for index, record in enumerate(records):
        for snippet, at in zip(record.snippets, record.positions, strict=True):
            assert snippet[at] == 100 + index
            assert len(expansion.unmerge(snippet)) == 50


@pytest.mark.slow
def test_the_last_part_is_shown_though_it_is_not_full() -> None:
    from distill_reference import PartProgress
    from machine import PeakMemory

    with PeakMemory(CPU) as memory:
        listening = PartProgress(memory, 2)
        with listening("distilling", 10, "snippets") as task:
            for amount in (3, 3, 2, 1):  # the tenth has no snippets
                task.advance(amount)
        with listening("reading", 10, "windows") as task:
            task.advance(10)
    assert [(part.stage, part.snippets) for part in listening.parts] == [("distilling", 6), ("distilling", 3)]
    assert min(part.peak_bytes for part in listening.parts) > 0


def test_a_budget_that_takes_longer_than_the_reference_is_known_before() -> None:
    from distill_reference import Run, _expected_seconds

    defaults = Run("ours", 8.0, 8.0, "float32", torch.zeros(1, 64))
    epochs = DistillConfig().epochs
    assert _expected_seconds(f"epochs={3 * epochs}", defaults, 20) == 24
    assert _expected_seconds("snippets=5", defaults, 20) == 2


@pytest.mark.slow
def test_work_counted_on_a_sample_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    import distill_reference

    records = distill_reference.random_records(6, 4, 512)
    expansion = Expansion([record.new_token for record in records], 512)
    task = distill_reference.Task("tiny", records, expansion, (1,), CPU)
    timed = distill_reference.time_ours(task, "").made
    everything = distill_reference.count_ours(task, timed)
    monkeypatch.setattr(distill_reference, "COUNTED_TOKENS", 3)
    sample = distill_reference.count_ours(task, timed)
    assert sample.body == pytest.approx(everything.body, rel=0.3)


def test_budgets_are_read_as_options_of_their_kinds() -> None:
    from distill_reference import _budget

    assert _budget("") == (None, DistillConfig(silence=0.0))
    assert _budget("silence=0.02")[1].silence == 0.02
    wanted = DistillConfig(target_layer="0.5", reach=None, cache_gib=1.5, silence=0.0)
    assert _budget("snippets=6,target_layer=0.5,reach=none,cache_gib=1.5") == (6, wanted)


def test_rows_left_out_are_no_comparison() -> None:
    from distill_reference import Run, row_sets

    run = Run("ours", 1.0, 1.0, "float32", torch.zeros(1, 64))
    with pytest.raises(SystemExit, match="ours made 1 rows for 2 tokens"):
        row_sets([run], frozen(), EXPANSION.tokens)


@pytest.mark.parametrize(("budget", "message"), [
    ("speed=3", "there is no option speed; there are snippets, method"), ("epochs", "is no list of KEY=VALUE"),
    ("epochs=many", "is no list of KEY=VALUE"), ("epochs=0", "--epochs is 0; it must be at least 1"),
])
def test_a_budget_that_means_nothing_is_refused(
    folder: Path, budget: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill_reference import main

    with pytest.raises(SystemExit, match="2"):
        main([*options(folder), "--ours", budget])
    assert message in capsys.readouterr().err


def test_absent_material_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distill_reference import main

    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(tmp_path / "nowhere"), "--corpus", str(tmp_path)])
    assert "nowhere does not exist; give --model and --corpus, or set VOCABEXT_ASSETS" in capsys.readouterr().err


def test_the_tiny_text_has_snippets_for_its_tokens(folder: Path) -> None:
    """Without them the tests above would compare nothing."""
    base = load_tokenizer(folder)
    found = collect(DOCUMENTS, base, new_tokens(folder), CollectConfig(snippets=6, min_snippets=2))
    assert min(len(record.snippets) for record in found) >= 2
