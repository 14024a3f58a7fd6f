"""The distillation engine: alignment, the objective, the gate, and what it writes."""

import math
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import tiny_folder, tiny_model
from tiny_expanded import DOCUMENTS, new_tokens
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from vocabext.checkpoint.folder import load_rows
from vocabext.checkpoint.rows import mean_rows
from vocabext.collect import collect
from vocabext.corpus import Document
from vocabext.distill import distill, distill_file, stage
from vocabext.distill.input_rows.contexts import Contexts, student_states, teach
from vocabext.distill.input_rows.engine import (
    _schedule,
    snippet_errors,
)
from vocabext.distill.input_rows.examples import build_examples
from vocabext.distill.input_rows.silence import sample_background
from vocabext.distill.overlap import text_numbers
from vocabext.distill.stage import _Distillation, _rounds
from vocabext.errors import CheckpointError, UsageError
from vocabext.files.jsonl import write_jsonl
from vocabext.files.ranges import file_sha256
from vocabext.model.frozen import FrozenModel, pick_device
from vocabext.options import CollectConfig, DistillConfig
from vocabext.progress import Task
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import Expansion, NewToken, TokenSnippets

FIRST = 10
EXPANSION = Expansion([NewToken("ab", "ab", (1, 2)), NewToken("cde", "cde", (3, 4, 5))], FIRST)


def frozen(layers: int = 2) -> FrozenModel:
    return FrozenModel(tiny_model(layers=layers), torch.device("cpu"), torch.float32)


def records() -> list[TokenSnippets]:
    return [
        TokenSnippets(EXPANSION.tokens[0], ((7, 10, 11, 8), (10, 9, 10)), (1, 2)),
        TokenSnippets(EXPANSION.tokens[1], ((6, 11, 10),), (1,)),
    ]


def test_examples_begin_at_the_token_and_align_by_the_last_piece() -> None:
    examples = build_examples(records(), EXPANSION, [0, 1], prefix_ids=[0])
    assert examples.token_S.tolist() == [0, 0, 1]
    assert examples.before_SP.tolist() == [[0, 7], [0, 0], [0, 6]]
    assert examples.before_S.tolist() == [2, 1, 2]
    assert examples.ids_ST.tolist() == [[10, 3, 4, 5, 8], [10, 9, 10, 0, 0], [11, 1, 2, 0, 0]]
    assert examples.length_S.tolist() == [5, 3, 3]
    assert examples.teacher_WU.tolist() == [
        [0, 7, 1, 2, 3, 4, 5, 8], [0, 1, 2, 9, 1, 2, 0, 0], [0, 6, 3, 4, 5, 1, 2, 0]]
    assert examples.aligned_ST[0].tolist() == [3, 4, 5, 6, 7]
    assert examples.aligned_ST[1, :3].tolist() == [2, 3, 5]


def test_the_teacher_reads_a_text_once_and_as_far_as_it_is_needed() -> None:
    text = (7, 10, 11, 8, 9, 6)
    same = [TokenSnippets(token, (text,), (at,)) for at, token in enumerate(EXPANSION.tokens, 1)]
    examples = build_examples([*same, records()[0]], EXPANSION, [0, 1, 0], prefix_ids=[0], reach=1)
    assert examples.text_S.tolist() == [0, 0, 1, 2]
    assert examples.teacher_WU[0].tolist() == [0, 7, 1, 2, 3, 4, 5, 8]  # as the second token needs it
    assert examples.teacher_length_W.tolist() == [8, 5, 4]
    assert examples.before_W.tolist() == [4, 2, 1]
    second = examples.take(torch.tensor([1, 3]))
    assert second.text_S.tolist() == [0, 1]
    assert second.teacher_WU.tolist() == [[0, 7, 1, 2, 3, 4, 5, 8], [0, 1, 2, 9, 0, 0, 0, 0]]
    model = frozen()
    for keep_past in (True, False):
        whole = teach(model, examples, 2, keep_past=keep_past)
        assert keep_past == (whole.past is not None and len(whole.past[0][0]) == 3)
        rows_GD = model.embedding_VD[[1, 3, 2]]
        part = whole.take(torch.arange(4), examples)
        errors_S = snippet_errors(model, examples, part, rows_GD, 2)
        for at in range(4):
            alone = examples.take(torch.tensor([at]))
            contexts = teach(model, alone, 2, keep_past=False)
            assert float(snippet_errors(model, alone, contexts, rows_GD, 2)) == pytest.approx(
                float(errors_S[at]), rel=1e-3)


def test_reach_cuts_both_sides_behind_the_token() -> None:
    examples = build_examples(records(), EXPANSION, [0, 1], reach=1)
    assert examples.ids_ST.tolist() == [[10, 3], [10, 9], [11, 1]]
    assert examples.teacher_WU.tolist() == [[7, 1, 2, 3, 0], [1, 2, 9, 0, 0], [6, 3, 4, 5, 1]]


def test_teacher_states_are_those_of_the_base_text() -> None:
    model, examples = frozen(), build_examples(records(), EXPANSION, [0, 1])
    states_STD = teach(model, examples, 2, keep_past=False).target_STD
    whole = model.model.model(torch.tensor([[6, 3, 4, 5, 1, 2]])).last_hidden_state[0]
    # The third snippet reads 6, [3 4 5], 1, 2: from the token on these are the base positions 3, 4, 5.
    assert torch.allclose(states_STD[2, :3], whole[[3, 4, 5]], atol=1e-5)


def test_a_student_that_reads_what_the_teacher_read_has_no_error() -> None:
    model = frozen()
    same = [TokenSnippets(NewToken("x", "x", (1,)), ((5, 10, 6, 7),), (1,))]
    examples = build_examples(same, Expansion([same[0].new_token], FIRST), [0])
    rows = model.embedding_VD[1:2].clone()
    contexts = teach(model, examples, 2, keep_past=True)
    assert float(snippet_errors(model, examples, contexts, rows, 2)) < 1e-9
    assert float(snippet_errors(model, examples, contexts, rows * 2, 2)) > 1e-4


def test_the_error_is_relative_and_ignores_padding() -> None:
    model, examples = frozen(), build_examples(records(), EXPANSION, [0, 1])
    contexts = teach(model, examples, 2, keep_past=False)
    errors_S = snippet_errors(model, examples, contexts, torch.zeros(2, 64), 2)
    hidden_STD = student_states(model, examples, None, torch.zeros(3, 64), 2)
    target_TD = contexts.target_STD[1, :3]
    by_hand = (hidden_STD[1, :3] - target_TD).square().sum() / target_TD.square().sum()
    assert float(errors_S[1]) == pytest.approx(float(by_hand), rel=1e-5)
    doubled = Contexts(hidden_STD.detach() * 2, None, contexts.text_S)
    errors_S = snippet_errors(model, examples, doubled, torch.zeros(2, 64), 2)
    assert errors_S.tolist() == pytest.approx([0.25] * 3)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_running_up_to_a_layer_gives_the_states_of_that_layer(layer: int) -> None:
    model = frozen(layers=3)
    ids = torch.tensor([[5, 6, 7, 8]])
    states = model.model.model(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(model.hidden(model.embed(ids), layer=layer), states[layer], atol=1e-5)
    assert len(model.model.model.layers) == 3


def test_padding_on_the_right_changes_nothing() -> None:
    model = frozen()
    short, padded = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0]])
    assert torch.allclose(model.hidden(model.embed(short)), model.hidden(model.embed(padded))[:, :3], atol=1e-5)


def test_every_step_shows_each_token_at_work_equally_often() -> None:
    parts = [build_examples([replace(r, snippets=r.snippets[:1] * n, positions=r.positions[:1] * n)
                             for r, n in zip(records(), counts, strict=True)], EXPANSION, [0, 1])
             for counts in ((4, 2), (3, 1))]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    steps = _schedule(parts, torch.tensor([0, 1]), 14, generators)
    shown: list[list[int]] = [[], []]
    for step in steps:
        owners = torch.cat([part.token_S[at] for part, at in zip(parts, step, strict=True)])
        assert owners.bincount().tolist() == [1, 1]
        for number, at in enumerate(step):
            shown[number] += at.tolist()
    assert [set(at) for at in shown] == [set(range(6)), set(range(4))]
    only = _schedule(parts, torch.tensor([1]), 3, generators)
    assert [len(at) for step in only for at in step].count(1) == 3


@pytest.mark.parametrize(("snippets", "epochs", "rounds"), [
    (22, 1, [(8, 8), (22, 14)]), (22, 2, [(8, 8), (16, 16), (22, 20)]), (1, 1, [(1, 1)]), (2, 1, [(2, 2)]),
    (22, 4, [(8, 8), (16, 16), (22, 32), (22, 32)]), (4, 4, [(4, 4), (4, 8), (4, 4)]),
])
def test_rounds_double_and_end_with_every_snippet(snippets: int, epochs: int, rounds: list[tuple[int, int]]) -> None:
    assert _rounds(snippets, epochs) == rounds
    assert _rounds(snippets, epochs, 1) == rounds[:1]


def collected(tmp_path: Path) -> tuple[Path, list[TokenSnippets]]:
    folder = tiny_folder(tmp_path / "base")
    base = load_tokenizer(folder)
    return folder, collect(DOCUMENTS, base, new_tokens(folder), CollectConfig(snippets=8, window=24, min_snippets=2))


def test_distilled_rows_match_the_teacher_better_than_the_mean(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    model = frozen(layers=1)
    config = DistillConfig(epochs=10, learning_rate=0.3)
    result = distill(found, model, config, first_new_id=load_tokenizer(folder).first_new_id)
    assert {report.method for report in result.reports} <= {"distill", "piece"}
    assert "distill" in {report.method for report in result.reports}
    assert result.relative_error is not None
    assert result.relative_error < 0.7
    assert not model.embedding_VD.requires_grad
    again = distill(found, model, config, first_new_id=load_tokenizer(folder).first_new_id)
    assert torch.equal(result.input_ND, again.input_ND)


def test_a_row_that_training_makes_worse_stays_at_the_better_start(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    model = frozen(layers=1)
    base = load_tokenizer(folder)
    # A tied model that is kept silent begins at the mean only.
    config = DistillConfig(epochs=1, learning_rate=1e6)
    silent = distill(found, model, config, first_new_id=base.first_new_id)
    assert {report.method for report in silent.reports} == {"mean"}
    config = DistillConfig(epochs=1, learning_rate=1e6, silence=0.0)
    result = distill(found, model, config, first_new_id=base.first_new_id)
    assert "piece" in {report.method for report in result.reports} <= {"mean", "piece"}
    means = mean_rows(model.embedding_VD, [r.new_token for r in found])
    for report, row, mean, record in zip(result.reports, result.input_ND, means, found, strict=True):
        kept = mean if report.method == "mean" else model.embedding_VD[record.new_token.run[-1]]
        assert torch.equal(row, kept)
        if report.start_error is None:  # its windows are all of one text, so nothing judges it
            assert (report.token, report.end_error, report.method) == (" are rated", None, "mean")
        else:
            assert report.end_error is not None
            assert (report.end_error < report.start_error) == (report.method == "piece")


def test_a_token_without_snippets_is_kept_at_the_mean_and_said_to_be(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    found[1] = replace(found[1], snippets=(), positions=())
    base = load_tokenizer(folder)
    result = distill(found, frozen(1), DistillConfig(epochs=2), first_new_id=base.first_new_id)
    assert (result.reports[1].method, result.reports[1].start_error) == ("mean", None)
    assert result.reports[0].start_error is not None


def sides(work: _Distillation) -> dict[int, tuple[set[bytes], set[bytes]]]:
    """For each token the base ids it trains on, and those that judge it."""
    def texts(record: TokenSnippets) -> set[bytes]:
        return {ids.tobytes() for ids in work.expansion.unmerge_batch(record.snippets)}

    held_out, *train = work._parts(work.trainable)
    return {token: (set().union(*(texts(part[at]) for part in train)), texts(held_out[at]))
            for at, token in enumerate(work.trainable)}


def work_on(found: list[TokenSnippets], first: int) -> _Distillation:
    return _Distillation(found, frozen(1), DistillConfig(epochs=1), first, (), None, 1.0)


@pytest.mark.parametrize("length", [40, 70])
def test_a_document_that_holds_a_token_twice_does_not_train_and_judge_it(tmp_path: Path, length: int) -> None:
    """A short one gives one text under two positions, a longer one windows that overlap."""
    folder = tiny_folder(tmp_path / "base")
    base, rng = load_tokenizer(folder), np.random.default_rng(0)
    words = ["the heart", " muscle", " rate", " rest", " of", " so", " and", " a", " is", " are"]
    documents = []
    for number in range(12):
        filling = "".join(words[i] for i in rng.integers(1, len(words), length))
        ids = base.encode(filling)[: length - 12]
        half = len(ids) // 2
        documents.append(Document(str(number), f"{base.decode(ids[:half])} the heart {number} the heart "
                                               f"{base.decode(ids[half:])}"))
    found = collect([*documents, *documents], base, new_tokens(folder)[1:2],
                    CollectConfig(snippets=40, window=50, min_snippets=2))
    assert len(found[0].snippets) > 12
    train, judges = sides(work_on(found, base.first_new_id))[0]
    numbers = text_numbers([np.frombuffer(text, np.int64) for text in (*train, *judges)])
    assert train
    assert judges
    assert not set(numbers[: len(train)]) & set(numbers[len(train) :])


def test_a_token_of_one_text_is_trained_and_judged_by_nothing(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    result = distill(found, frozen(1), DistillConfig(epochs=4), first_new_id=load_tokenizer(folder).first_new_id)
    assert [(r.token, r.start_error) for r in result.reports if r.start_error is None] == [(" are rated", None)]
    alone = result.reports[2]
    assert (alone.method, alone.end_error, alone.left_out, alone.shown) == ("distill", None, None, 21)
    train, judges = sides(work_on(found, load_tokenizer(folder).first_new_id))[2]
    assert (len(train), judges) == (4, set())


def test_one_text_under_two_positions_is_too_little_to_train_on(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    twice = found[2].snippets[:1] * 2
    found[2] = replace(found[2], snippets=twice, positions=(found[2].positions[0], len(twice[0]) - 1))
    result = distill(found, frozen(1), DistillConfig(epochs=1), first_new_id=load_tokenizer(folder).first_new_id)
    assert (result.reports[2].method, result.reports[2].start_error, result.reports[2].shown) == ("mean", None, 0)


def test_layers_are_named_by_number_fraction_or_last() -> None:
    model = frozen(layers=3)
    assert [model.layer_number(t) for t in ("last", "2", "0.34", "1.0")] == [3, 2, 2, 3]
    for wrong in ("4", "0", "middle", "1.5"):
        with pytest.raises(UsageError, match="--target-layer"):
            model.layer_number(wrong)


def test_new_rows_are_scaled_like_the_rows_of_a_model_that_scales_its_embedding() -> None:
    config = Gemma3TextConfig(vocab_size=FIRST, hidden_size=40, intermediate_size=48, num_hidden_layers=1, head_dim=20,
                              num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    for dtype in (torch.float32, torch.bfloat16):  # the class rounds its scale, the root of 40, to the dtype
        model = FrozenModel(Gemma3ForCausalLM(config), torch.device("cpu"), dtype)
        rows = model.embedding_VD[[7, 9]].float().requires_grad_()
        new = model.embed(torch.tensor([[FIRST, FIRST + 1]]), rows, FIRST)
        assert torch.equal(new, model.embed(torch.tensor([[7, 9]])))
        assert torch.allclose(new[0].float(), 40**0.5 * rows, rtol=0.01)
        gradient = torch.autograd.grad(new.sum(), rows)[0]
        assert float(gradient.min()) > 6  # that of the first new row, too, which is no padding


def test_a_file_of_snippets_becomes_a_file_of_rows(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    write_jsonl(tmp_path / "snippets.jsonl", "snippets", {"options": {"window": 24}}, [r.to_json() for r in found])
    config = DistillConfig(epochs=2, dtype="float32", device="cpu")
    result = distill_file(tmp_path / "snippets.jsonl", str(folder), tmp_path / "rows.safetensors", config)
    tokens, rows, header = load_rows(tmp_path / "rows.safetensors")
    assert [t.token for t in tokens] == [found[i].new_token.token for i in result.kept]
    assert torch.equal(rows.input_ND, result.input_ND[result.kept])
    assert [fact["token"] for fact in header["per_token"]] == [t.token for t in tokens]
    assert not list(tmp_path.glob(".*"))
    assert header["options"]["window"] == 24
    assert header["base"] == {"model": str(folder), "num_used_ids": load_tokenizer(folder).first_new_id,
                              "hidden_size": 64, "tokenizer_sha256": file_sha256(folder / "tokenizer.json")}


def test_a_class_that_cannot_be_built_fails_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = collected(tmp_path)
    write_jsonl(tmp_path / "snippets.jsonl", "snippets", {}, [r.to_json() for r in found])

    def cannot(*_: object, **__: object) -> None:
        raise CheckpointError("cannot build the model class")

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(stage, "check_patchable", cannot)
    monkeypatch.setattr(stage, "load_model", loaded)
    with pytest.raises(CheckpointError, match="cannot build"):
        distill_file(tmp_path / "snippets.jsonl", str(folder), tmp_path / "rows.safetensors",
                     DistillConfig(dtype="float32", device="cpu"))


def test_candidates_are_enough_for_the_mean_and_for_nothing_else(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    path = tmp_path / "candidates.jsonl"
    write_jsonl(path, "candidates", {}, [r.new_token.to_json() for r in found])
    result = distill_file(path, str(folder), tmp_path / "rows.safetensors", DistillConfig(method="mean"))
    assert np.isfinite([report.norm for report in result.reports]).all()
    with pytest.raises(UsageError, match=r"'candidates', but 'snippets' \(from `vocabext collect`\) is needed"):
        distill_file(path, str(folder), tmp_path / "other.safetensors", DistillConfig())


@pytest.mark.parametrize(("header", "rows", "message"), [
    ({}, [], "holds no tokens; mine again"),
    ({}, [{"token": "x"}], "is damaged at token 1: 'key' is missing; mine again, or mend it"),
    ({"base": {"model": "org/other", "num_used_ids": 7}}, None, "was made for org/other with 7 token ids, but this"),
])
def test_a_damaged_empty_or_foreign_file_is_refused(
    tmp_path: Path, header: dict[str, object], rows: list[dict[str, object]] | None, message: str
) -> None:
    folder, found = collected(tmp_path)
    path = tmp_path / "snippets.jsonl"
    write_jsonl(path, "snippets", header, [r.to_json() for r in found] if rows is None else rows)
    with pytest.raises(UsageError, match=message):
        distill_file(path, str(folder), tmp_path / "rows.safetensors", DistillConfig(method="mean"))
    assert not (tmp_path / "rows.safetensors").exists()


@pytest.mark.parametrize(("option", "values"), [
    ("device", ("mps", "meta", "cuda:x", "gpu")), ("dtype", ("foo", "int8")),
    ("learning_rate", (0.0, math.inf, math.nan)),
    ("target_layer", ("", "0", "-1", "first", "1.5", "0.0", "1e3")), ("reach", (-1,)), ("rounds", (0,)),
    ("leave_out", (-1.0, math.nan)), ("cache_gib", (-1.0, math.inf)),
])
def test_options_out_of_range_are_refused_before_anything_is_loaded(option: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is "):
            DistillConfig(**{option: value})  # type: ignore[arg-type]
    for target in ("last", "1", "12", "0.5", ".25", "1.0", "0.05"):
        assert DistillConfig(target_layer=target).target_layer == target


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device is 'cuda', but torch sees no GPU here; use --device cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="--device is 'cuda:2', but torch sees 2 GPUs"):
        pick_device("cuda:2")


def test_what_a_row_takes_is_what_the_base_tokens_lose() -> None:
    model = frozen()
    group = build_examples(records(), EXPANSION, [0, 1])
    background = sample_background(model, [group], 290, torch.Generator().manual_seed(0))
    assert len(background.hidden_PD) == 7 + 5 + 6  # every base id of the three snippets, no padding
    row = 30 * background.hidden_PD[0]
    before = model.log_probabilities(background.hidden_PD, first_new_id=290)
    after = model.log_probabilities(background.hidden_PD, first_new_id=290, new_rows_ND=row[None])[:, :290]
    assert float(background.taken(row[None])) == pytest.approx(float((before - after).mean()), rel=1e-4)
    assert float(background.taken(row[None])) > 0.1


def test_what_a_row_takes_counts_the_bias_of_its_token(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    first = load_tokenizer(folder).first_new_id
    whole = tiny_model()
    head = torch.nn.Linear(64, whole.config.vocab_size)
    head.weight, head.bias.data[:] = whole.get_input_embeddings().weight, 4.0
    whole.set_output_embeddings(head)
    model = FrozenModel(whole, torch.device("cpu"), torch.float32)
    background = sample_background(model, [build_examples(records(), EXPANSION, [0, 1])], 290, torch.Generator())
    row, bias = background.hidden_PD[0], torch.tensor([2.0])
    before, after = (model.log_probabilities(background.hidden_PD, first_new_id=290, **new)[:, :290]
                     for new in ({}, {"new_rows_ND": row[None], "new_bias_N": bias}))
    assert float(background.taken(row[None], bias)) == pytest.approx(float((before - after).mean()), rel=1e-4)
    seen: list[float] = []
    for loud in (4.0, -4.0):  # of the pieces: they are what new tokens get the mean of
        head.bias.data[:] = 0.0
        head.bias.data[[piece for r in found for piece in r.new_token.run]] = loud
        result = distill(found, model, DistillConfig(epochs=1), first_new_id=first)
        assert result.taken_nats_start is not None
        seen.append(result.taken_nats_start)
    assert seen[0] > 10 * seen[1]


@pytest.mark.slow
def test_the_rows_of_a_tied_model_are_kept_silent(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    first = load_tokenizer(folder).first_new_id

    def taken(silence: float) -> float:
        config = DistillConfig(epochs=10, learning_rate=0.3, silence=silence)
        nats = distill(found, frozen(1), config, first_new_id=first).taken_nats
        assert nats is not None
        return nats

    assert taken(10.0) < 0.9 * taken(0.0)


def test_an_untied_model_needs_no_silence(tmp_path: Path) -> None:
    folder, found = collected(tmp_path)
    model = FrozenModel(tiny_model(tied=False), torch.device("cpu"), torch.float32)
    result = distill(found, model, DistillConfig(epochs=1), first_new_id=load_tokenizer(folder).first_new_id)
    assert not model.tied
    assert result.taken_nats is None


@pytest.mark.parametrize("target", ["1", "2", "last"])
def test_neither_the_head_nor_a_layer_above_the_target_runs(tmp_path: Path, target: str) -> None:
    folder, found = collected(tmp_path)
    model = FrozenModel(tiny_model(layers=3, tied=False), torch.device("cpu"), torch.float32)
    ran: Counter[str] = Counter()
    assert model.takes_branches  # tried once, on all layers
    watched = {"head": model.model.get_output_embeddings(),
               **{f"layer {i + 1}": layer for i, layer in enumerate(model.model.get_decoder().layers)}}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: ran.update([name]))
    first = load_tokenizer(folder).first_new_id
    distill(found, model, DistillConfig(epochs=1, target_layer=target, output_rows="none"), first_new_id=first)
    needed = 3 if target == "last" else int(target)
    assert {*ran} == {f"layer {i + 1}" for i in range(needed)}
    assert min(ran.values()) > 2


def test_progress_tells_what_it_needs_how_far_it_is_and_how_well(tmp_path: Path) -> None:
    """Count snippets that go through the model: many reports for each group of tokens, the last one at the total."""
    folder, found = collected(tmp_path)
    said: list[str] = []
    advanced: list[int] = []
    left = [0]

    class Watched:
        def advance(self, amount: int = 1, /) -> None:
            advanced.append(amount)
            left[0] -= amount

        def skip(self, amount: int, /) -> None:
            left[0] -= amount

        def note(self, text: str, /) -> None:
            said.append(text)

    def progress(description: str, /, total: int | None = None, unit: str = "") -> AbstractContextManager[Task]:
        said.append(f"{description} {unit}")
        left[0] += total or 0
        return nullcontext(Watched())

    config = DistillConfig(epochs=1, cache_gib=0.0)
    distill(found, frozen(1), config, first_new_id=load_tokenizer(folder).first_new_id, progress=progress)
    assert "of memory for 1 tokens at a time: model" in said[0]
    assert said[1] == "distilling snippets"
    assert said[-1].endswith("% of the start")
    assert len(advanced) > 8 * len(found)
    assert max(advanced) < sum(advanced) / 4
    assert left == [0]
