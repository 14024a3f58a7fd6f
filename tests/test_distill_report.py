"""The quality gate, and what is said about a row."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import tiny_folder
from tiny_expanded import DOCUMENTS, new_tokens

import vocabext.distill.stage as stage
from vocabext.checkpoint.folder import load_rows
from vocabext.collect import collect
from vocabext.distill import distill_file
from vocabext.distill.input_rows.report import left_out_reasons, nearest_rows
from vocabext.files.jsonl import write_jsonl
from vocabext.options import CollectConfig, DistillConfig
from vocabext.patch.stage import patch
from vocabext.tokenizer import load_tokenizer


def test_a_token_is_left_out_if_it_is_far_worse_than_the_rest_and_training_did_not_halve_it() -> None:
    errors = [(1.0, 0.1), (0.9, 0.12), (0.8, 0.1), (0.6, 0.5), (1.5, 0.5), (0.4, 0.3), None, (0.2, 0.11), (0.2, 0.1)]
    reasons = left_out_reasons(errors, 3.0)
    assert [reason is not None for reason in reasons] == [i == 3 for i in range(9)]
    assert reasons[3] == "error 0.500 is above 0.345, and 83% of the mean's"
    assert left_out_reasons(errors, 0.0) == [None] * 9
    assert left_out_reasons([None], 3.0) == [None]


def test_the_median_token_is_never_left_out() -> None:
    assert left_out_reasons([(0.5, 0.5)] * 3, 1.0) == [None] * 3


def test_a_part_stays_while_something_that_stays_is_merged_from_it() -> None:
    good, bad = (1.0, 0.1), (1.0, 0.9)
    errors, parts = [bad, bad, good, bad, bad, *[good] * 6], [(), (0,), (1,), (4,), (), *[()] * 6]
    reasons = left_out_reasons(errors, 3.0, parts)
    assert [reason is None for reason in reasons] == [True, True, True, False, False, *[True] * 6]
    alone = left_out_reasons(errors, 3.0)
    assert [reason is None for reason in alone] == [False, False, True, False, False, *[True] * 6]


def test_nearest_rows_are_those_with_the_largest_cosines() -> None:
    base = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 3.0]])
    (nearest,) = nearest_rows(torch.tensor([[5.0, 1.0]]), base)
    assert [token_id for token_id, _ in nearest] == [0, 3, 1]
    assert nearest[0][1] == pytest.approx(5 / 26**0.5)


def test_what_is_left_out_is_listed_and_patch_numbers_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path / "base")
    base, tokens = load_tokenizer(folder), new_tokens(folder)
    found = collect(DOCUMENTS, base, tokens, CollectConfig(snippets=8, window=24, min_snippets=2))
    write_jsonl(tmp_path / "snippets.jsonl", "snippets", {}, [r.to_json() for r in found])
    monkeypatch.setattr(stage, "left_out_reasons", lambda errors, *_: ["too hard"] + [None] * (len(errors) - 1))
    result = distill_file(tmp_path / "snippets.jsonl", str(folder), tmp_path / "rows.safetensors",
                          DistillConfig(epochs=1, dtype="float32", device="cpu"))
    kept, _, header = load_rows(tmp_path / "rows.safetensors")
    assert [token.token for token in kept] == [token.token for token in tokens[1:]]
    assert [fact["token"] for fact in header["left_out"]] == [tokens[0].token]
    assert header["left_out"][0]["left_out"] == "too hard"
    assert len(result.reports) == len(tokens)
    done = patch(tmp_path / "rows.safetensors", str(folder), tmp_path / "new")
    assert (done.num_new, done.first_new_id) == (len(tokens) - 1, base.first_new_id)
    report = result.reports[1]
    assert len(report.nearest) == 3
    assert report.relative_norm is not None
    assert report.shown > 0
