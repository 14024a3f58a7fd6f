"""Tests of patching every family: names from the class, all tables extended, base text computed as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from base_logits import logits, same_over_base_rows
from fuzz import every
from patch_case import make_rows
from safetensors.torch import load_file
from tiny_checkpoints import default_dtype
from tiny_families import FAMILIES, FEW, every_family, tiny_family

from vocabext.checkpoint.architecture import embedding_names
from vocabext.checkpoint.folder import Rows, load_rows, open_checkpoint, save_rows
from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.rows import mean_rows
from vocabext.checkpoint.vocabulary import EMBEDDING, HEAD, HEAD_BIAS, PER_LAYER
from vocabext.errors import CheckpointError
from vocabext.patch.stage import patch
from vocabext.verify.stage import verify

TEXTS = tuple(f" heart {word}" for word in ("rate", "muscle", "of", "and", "the", "rest", "so", "a"))
PROMPT = [0, 40, 77, 120, 260, 285, 9]
UNTIED_ONLY = {"llama", "mistral", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-neox", "olmo2", "phi", "phi3", "llava",
               "qwen2.5-vl", "mistral3"}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def expand(tmp_path: Path, family: str, **options: Any) -> tuple[Path, Path]:
    base = tiny_family(tmp_path / "base", family)
    make_rows(base, tmp_path / "rows.safetensors", TEXTS)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new", **options)
    return base, tmp_path / "new"


@pytest.mark.slow
@every_family
def test_a_family_is_extended_and_reads_base_text_as_before(tmp_path: Path, family: str) -> None:
    base, new = expand(tmp_path, family)
    old, now, manifest = stored(base), stored(new), read_manifest(new)
    tokens, rows, _ = load_rows(tmp_path / "rows.safetensors")
    first, end = manifest.first_new_id, manifest.first_new_id + len(tokens)  # some classes add special tokens
    assert old.keys() == now.keys()
    for name in old.keys() - manifest.tensors.keys():
        assert torch.equal(old[name], now[name]), name
    for name, record in manifest.tensors.items():
        before, used = len(old[name]), min(first, len(old[name]))
        assert (record.num_rows_before, record.num_rows) == (before, len(now[name]))
        assert torch.equal(now[name][:used], old[name][:used])
        expected = rows.input_ND if record.role == EMBEDDING or (
            record.role == HEAD and family not in UNTIED_ONLY) else mean_rows(old[name], tokens)
        assert torch.equal(now[name][first:end], expected.to(old[name].dtype)), name
        surplus = now[name][max(before, end):]
        assert bool((surplus == (-10_000 if record.role == HEAD_BIAS else 0)).all())
    assert same_over_base_rows(base, new, PROMPT, first)
    assert torch.isfinite(logits(new, [*PROMPT, first, end - 1])).all()
    assert embedding_names(new).shapes == {name: (len(now[stored_as]), *shape[1:]) for (name, shape), stored_as in
                                           zip(embedding_names(new).shapes.items(), names(new), strict=True)}


def names(folder: Path) -> list[str]:
    """The stored name of each vocabulary parameter, in the order of the class; a tied head is the embedding."""
    checkpoint = open_checkpoint(folder)
    found = {tensor.parameter: name for name, tensor in checkpoint.row_tensors.items()}
    return [found.get(parameter, checkpoint.vocab_tensors[0]) for parameter in checkpoint.names.shapes]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3n", "gemma3n-shorter-table", "gemma4", "gemma4-wrapped"])
def test_per_layer_embeddings_are_extended(tmp_path: Path, family: str) -> None:
    _, new = expand(tmp_path, family)
    (record,) = [record for record in read_manifest(new).tensors.values() if record.role == PER_LAYER]
    assert record.num_rows >= 298
    assert "mean" in record.rows


def test_a_head_bias_is_extended_and_keeps_surplus_rows_silent(tmp_path: Path) -> None:
    base = tiny_family(tmp_path / "base", "phi", num_rows=292)
    make_rows(base, tmp_path / "rows.safetensors", TEXTS[:3])
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    new = stored(tmp_path / "new")
    assert new["lm_head.bias"].shape == (296,)
    assert bool((new["lm_head.bias"][293:] == -10_000).all())
    assert float(logits(tmp_path / "new", PROMPT).softmax(-1)[:, 293:].max()) == 0


@pytest.mark.slow
def test_a_head_bias_keeps_new_tokens_from_being_written_at_any_state(tmp_path: Path) -> None:
    base = tiny_family(tmp_path / "base", "phi", num_rows=292)
    make_rows(base, tmp_path / "rows.safetensors", TEXTS[:3])
    tokens, rows, header = load_rows(tmp_path / "rows.safetensors")
    for kind, loudest in (("none", 0.0), ("mean", 1e-6)):
        save_rows(tmp_path / f"{kind}.safetensors", tokens, Rows(rows.input_ND, 0.01 * rows.input_ND), {
            **header, "writing": {"kind": kind}})
        patch(tmp_path / f"{kind}.safetensors", str(base), tmp_path / kind)
        found = float(logits(tmp_path / kind, [*PROMPT, 290]).softmax(-1)[:, 290:293].max())
        assert found == loudest == 0.0 or found > loudest > 0.0
    assert "never written" in read_manifest(tmp_path / "none").tensors["lm_head.bias"].rows


@pytest.mark.slow
def test_a_silent_head_bias_does_not_depend_on_the_default_dtype(tmp_path: Path) -> None:
    base = tiny_family(tmp_path / "base", "phi", num_rows=292)
    make_rows(base, tmp_path / "rows.safetensors", TEXTS[:3])
    tokens, rows, header = load_rows(tmp_path / "rows.safetensors")
    save_rows(tmp_path / "rows.safetensors", tokens, Rows(rows.input_ND, 0.01 * rows.input_ND),
              {**header, "writing": {"kind": "none"}})
    with default_dtype(torch.bfloat16):  # which has no -10,000: the nearest is -9,984
        patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
        assert verify(tmp_path / "new", str(base), load_weights=False).passed
    assert bool((stored(tmp_path / "new")["lm_head.bias"][290:] == -10_000).all())


UNTIED = sorted(set(FAMILIES) - UNTIED_ONLY)


@pytest.mark.slow
@every("family", UNTIED, few=[name for name in FEW if name in UNTIED])
def test_a_tied_family_is_untied(tmp_path: Path, family: str) -> None:
    base, new = expand(tmp_path, family, untie=True)
    checkpoint = open_checkpoint(new)
    assert not checkpoint.tied
    assert len(checkpoint.vocab_tensors) == 2
    assert same_over_base_rows(base, new, PROMPT, 290)
    assert read_manifest(new).untied


def test_a_wrapper_whose_ids_mean_sounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vocabext.checkpoint import architecture

    base = tiny_family(tmp_path / "base", "gemma3n")
    make_rows(base, tmp_path / "rows.safetensors", TEXTS[:3])
    monkeypatch.setattr(architecture, "_first_reserved_id", lambda _: 292)
    with pytest.raises(CheckpointError, match=r"takes ids from 292 on for images or sounds, .* the ids 290 to 292"):
        patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    monkeypatch.setattr(architecture, "_first_reserved_id", lambda _: 293)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")


def test_reserved_ids_are_read_from_the_config() -> None:
    from vocabext.checkpoint.architecture import _first_reserved_id

    assert _first_reserved_id(transformers.Gemma3nConfig()) == 262_144
    assert _first_reserved_id(transformers.LlamaConfig()) is None
