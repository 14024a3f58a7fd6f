"""Every family: `verify` passes, `revert` gives every byte back, `diff` and `inspect` name the tables."""

from pathlib import Path

import pytest
import torch
import transformers
from patch_case import make_rows
from planted import HEAD, detail, edit_tensor, failed, set_row, skipped
from tiny_families import FAMILIES, GAP_IN_TABLE, every_family, tiny_family

from vocabext.checkpoint.folder import Rows, load_rows, save_rows
from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.vocabulary import PER_LAYER
from vocabext.diff import diff
from vocabext.distill.output_rows.stage import make_output_rows
from vocabext.inspect import inspect_model
from vocabext.model.frozen import load_model
from vocabext.patch.stage import patch
from vocabext.revert import revert
from vocabext.tokens import Expansion, TokenSnippets
from vocabext.verify import behaviour
from vocabext.verify.stage import verify

TEXTS = tuple(f" heart {word}" for word in ("rate", "muscle", "of", "and", "the", "rest", "so", "a"))
LOGITS = "loads in transformers, same logits"
OLD, NEW = "old rows bit-identical", "new rows plausible"
BIAS = HEAD.replace("weight", "bias")


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 50)
    monkeypatch.setattr(behaviour, "STREAMED", 20)
    monkeypatch.setattr(behaviour, "RANDOM_ROWS", 20)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expanded(tmp_path: Path, family: str, texts: tuple[str, ...] = TEXTS) -> tuple[Path, Path]:
    base = tiny_family(tmp_path / "base", family)
    make_rows(base, tmp_path / "rows.safetensors", texts)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    return base, tmp_path / "new"


@pytest.mark.slow
@every_family
def test_a_family_goes_there_and_back(tmp_path: Path, family: str) -> None:
    base, folder = expanded(tmp_path, family)
    result = verify(folder, str(base))
    assert failed(result) == []
    assert LOGITS not in skipped(result)
    revert(folder, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    roles = {record.role for record in read_manifest(folder).tensors.values()}
    assert {row.role for row in inspect_model(str(base)).row_tensors} == roles
    changed = {tensor.note.split(";")[0] for tensor in diff(str(base), folder).tensors}
    assert changed == roles


@pytest.mark.slow
def test_rows_of_base_ids_that_a_table_lacks_must_be_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "gap", GAP_IN_TABLE)
    base, folder = expanded(tmp_path, "gap", (" so of", " muscle of"))
    assert failed(verify(folder, str(base), load_weights=False)) == []
    revert(folder, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    (name,) = (name for name, record in read_manifest(folder).tensors.items() if record.role == PER_LAYER)
    assert read_manifest(folder).tensors[name].num_rows_before == 289 < read_manifest(folder).first_new_id
    edit_tensor(folder, name, set_row(289, 0.5))
    result = verify(folder, str(base), load_weights=False)
    assert failed(result) == [OLD]
    assert detail(result, OLD).startswith(f"row 289 of {name} is none of the base's and is not zero")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_keeps_new_tokens_silent_is_plausible(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_family(tmp_path / "base", "phi")
    transformers.PhiForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    tokens = make_rows(base, tmp_path / "mean.safetensors", TEXTS)
    _, rows, header = load_rows(tmp_path / "mean.safetensors")
    model, records = load_model(base, device="cpu", dtype="float32"), [TokenSnippets(token) for token in tokens]
    made = make_output_rows("fit", records, model, Expansion(tokens, 290))
    assert made.kind == "none"
    save_rows(tmp_path / "rows.safetensors", tokens, Rows(rows.input_ND, made.output_ND), {
        **header, "writing": made.summary()})
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    assert failed(verify(tmp_path / "new", str(base), load_weights=False)) == []
    edit_tensor(tmp_path / "new", BIAS, set_row(291, 10_000.0))
    result = verify(tmp_path / "new", str(base), load_weights=False)
    assert failed(result) == [NEW]
    assert "times as long as the longest base row" in detail(result, NEW)


@pytest.mark.slow
def test_a_bias_of_no_id_must_be_silent(tmp_path: Path) -> None:
    base, folder = expanded(tmp_path, "phi")
    assert failed(verify(folder, str(base), load_weights=False)) == []
    edit_tensor(folder, BIAS, set_row(300, 0.0))
    result = verify(folder, str(base), load_weights=False)
    assert failed(result) == [NEW]
