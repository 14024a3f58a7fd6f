"""Memory: stated before the work, bounded by a budget; models that do not fit."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import tiny_folder, tiny_model
from tiny_expanded import DOCUMENTS, new_tokens

from vocabext.collect import collect
from vocabext.distill import distill
from vocabext.distill.input_rows.memory import plan_memory
from vocabext.errors import UsageError
from vocabext.model.frozen import FrozenModel, load_model, parse_max_memory
from vocabext.options import CollectConfig, DistillConfig
from vocabext.tokenizer import load_tokenizer


def frozen(layers: int = 2) -> FrozenModel:
    return FrozenModel(tiny_model(layers=layers), torch.device("cpu"), torch.float32)


def test_a_budget_bounds_what_is_kept_of_a_group() -> None:
    model = frozen()
    options = {"tokens": 100, "snippets": 25, "before": 20, "width": 9, "layer": 2, "positions": 4_000,
               "wanted_group": 50}
    plenty = plan_memory(model, **options, budget_bytes=10**9, exact=True)
    assert (plenty.group, plenty.keep_past) == (50, True)
    # 2 layers x keys and values x 64 numbers of 4 bytes, for each of 20 positions of 25 snippets of 50 tokens
    assert plenty.past_bytes == 2 * 2 * 64 * 4 * 20 * 25 * 50
    assert plenty.states_bytes == 9 * 64 * 4 * 25 * 50
    one = (plenty.past_bytes + plenty.states_bytes) // 50
    some = plan_memory(model, **options, budget_bytes=10 * one, exact=True)
    assert (some.group, some.keep_past) == (10, True)
    little = plan_memory(model, **options, budget_bytes=7 * one, exact=True)
    assert not little.keep_past
    assert little.past_bytes == 0
    assert little.states_bytes <= 7 * one
    nothing = plan_memory(model, **options, budget_bytes=0, exact=True)
    assert (nothing.group, nothing.keep_past) == (1, False)
    assert not plan_memory(model, **options, budget_bytes=10**9, exact=False).keep_past
    assert "for 50 tokens at a time: model" in plenty.describe()


def test_what_a_position_needs_is_measured() -> None:
    model = frozen()
    assert model.past_bytes(1) * 2 == model.past_bytes(2) == 2 * 2 * 64 * 4
    assert 1.1 < model.step_bytes(2) / model.step_bytes(1) < 2.1
    assert model.step_bytes(2, positions=8, before=24) > model.step_bytes(2, positions=8)
    assert model.weight_bytes == sum(p.numel() * 4 for p in model.model.parameters())


def test_memory_stays_flat_when_there_are_more_tokens(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    found = collect(DOCUMENTS, load_tokenizer(folder), new_tokens(folder), CollectConfig(snippets=8, window=24,
                                                                                         min_snippets=2))
    first = load_tokenizer(folder).first_new_id
    config = DistillConfig(epochs=1, cache_gib=0.0)
    few = distill(found, frozen(), config, first_new_id=first)
    assert few.memory is not None
    assert few.memory.group == 1


def test_a_model_that_is_offloaded_gives_the_same_rows(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    tiny_model(layers=3).save_pretrained(folder)
    base = load_tokenizer(folder)
    found = collect(DOCUMENTS, base, new_tokens(folder), CollectConfig(snippets=8, window=24, min_snippets=2))
    here = load_model(folder, device="cpu", dtype="float32")
    spread = load_model(folder, device="cpu", dtype="float32", max_memory="cpu=150KB",
                        offload_folder=tmp_path / "offload")
    assert (here.offloaded, spread.offloaded) == (False, True)
    assert spread.tied
    config = DistillConfig(epochs=1)
    rows = [distill(found, model, config, first_new_id=base.first_new_id) for model in (here, spread)]
    assert rows[0].memory is not None
    assert rows[1].memory is not None
    assert (rows[0].memory.keep_past, rows[1].memory.keep_past) == (True, False)
    assert torch.allclose(rows[0].input_ND, rows[1].input_ND, atol=1e-3)
    assert not torch.allclose(rows[0].input_ND, rows[0].input_ND * 0 + rows[0].input_ND.mean(), atol=1e-3)


def test_limits_of_memory_are_read_or_refused() -> None:
    assert parse_max_memory("0=20GiB,cpu=1.5 GiB") == {0: "20GiB", "cpu": "1.5GiB"}
    for wrong in ("", "20GiB", "gpu=1GiB", "0=20", "0:20GiB"):
        with pytest.raises(UsageError, match="--max-memory is"):
            parse_max_memory(wrong)


def test_weights_that_stay_on_disk_are_not_counted_as_memory(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    tiny_model(layers=3).save_pretrained(folder)
    spread = load_model(folder, device="cpu", dtype="float32", max_memory="cpu=150KB",
                        offload_folder=tmp_path / "offload")
    every = sum(parameter.nbytes for parameter in spread.model.parameters())
    here = sum(parameter.nbytes for parameter in spread.model.parameters() if not parameter.is_meta)
    layer = sum(parameter.nbytes for parameter in spread.model.model.layers[-1].parameters())
    assert here <= 150_000 < every
    assert here + layer <= spread.weight_bytes < every
