"""Tests of giving a tied model an output head of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from base_logits import same_over_base_rows
from patch_case import EMBEDDING, HEAD, WEIGHTS, Case, make_case, make_rows, rewrite, stored
from planted import detail, draw_fewer_texts, edit_tensor, failed, set_row
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from vocabext.checkpoint.folder import INDEX_NAME, Rows, load_rows, open_checkpoint, save_rows
from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.rows import mean_rows
from vocabext.errors import CheckpointError
from vocabext.patch import plan as patch_plan
from vocabext.verify.stage import verify


def check_untied(case: Case, output_ND: torch.Tensor) -> None:
    """Check that input and output rows differ and that base logits are the base's."""
    _, rows, _ = load_rows(case.rows)
    new, config = stored(case.output), json.loads((case.output / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert torch.equal(new[EMBEDDING][290:293], rows.input_ND)
    assert torch.equal(new[HEAD][290:293], output_ND)
    assert torch.equal(new[HEAD][:290], new[EMBEDDING][:290])
    assert torch.equal(new[HEAD][293:], new[EMBEDDING][293:])
    model = AutoModelForCausalLM.from_pretrained(case.output)
    assert torch.equal(model.get_output_embeddings().weight[290:293], output_ND)
    assert torch.equal(model.get_input_embeddings().weight[290:293], rows.input_ND)
    ids = AutoTokenizer.from_pretrained(case.base).encode("the muscle")
    assert same_over_base_rows(case.base, case.output, ids, 290)
    manifest = read_manifest(case.output)
    assert manifest.untied
    assert manifest.tensors.keys() == {EMBEDDING, HEAD}


def given_rows(case: Case) -> torch.Tensor:
    make_rows(case.base, case.rows, output=True)
    output_ND = load_rows(case.rows)[1].output_ND
    assert output_ND is not None
    return output_ND


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("num_rows", [300, 290])
def test_output_rows_of_their_own_untie_the_model(tmp_path: Path, sharded: bool, num_rows: int) -> None:
    case = make_case(tmp_path, sharded=sharded, num_rows=num_rows)
    output_ND = given_rows(case)
    said: list[str] = []
    result = case.patch(say=said.append)
    check_untied(case, output_ND)
    assert result.head_rows == "from the rows file"
    assert result.untied_bytes == result.num_rows * 64 * 4
    assert len(said) == 1
    assert f"{result.untied_bytes / 1e6:,.1f} MB more" in said[0]
    if sharded:
        index = json.loads((case.output / INDEX_NAME).read_text())
        assert index["weight_map"][HEAD] == index["weight_map"][EMBEDDING]
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(case.output).values())
        assert index["metadata"]["total_parameters"] == AutoModelForCausalLM.from_pretrained(
            case.output).num_parameters()


def test_untying_alone_takes_the_mean_of_the_pieces(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    result = case.patch(untie=True)
    tokens, _, _ = load_rows(case.rows)
    check_untied(case, mean_rows(stored(case.base)[EMBEDDING], tokens))
    assert "mean of the head rows" in result.head_rows


def test_output_rows_that_are_the_input_rows_leave_the_model_tied(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    tensors = load_file(case.rows)
    with open(case.rows, "rb") as file:
        header = json.loads(file.read()[8:][:int.from_bytes(case.rows.read_bytes()[:8], "little")])
    save_file({"input": tensors["input"], "output": tensors["input"].clone()}, case.rows, header["__metadata__"])
    said: list[str] = []
    result = case.patch(say=said.append)
    assert (result.untied_bytes, said) == (0, [])
    assert HEAD not in stored(case.output)
    assert not read_manifest(case.output).untied
    assert open_checkpoint(case.output).tied


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD, "both"])
def test_every_way_to_store_a_tied_matrix_is_untied(tmp_path: Path, kept: str) -> None:
    case = make_case(tmp_path)
    if kept == HEAD:
        rewrite(case.base, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    if kept == "both":
        rewrite(case.base, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    output_ND = given_rows(case)
    result = case.patch()
    check_untied(case, output_ND)
    assert bool(result.untied_bytes) == (kept != "both")


def test_an_untied_model_is_not_untied_again(tmp_path: Path) -> None:
    case = make_case(tmp_path, tied=False)
    config = json.loads((case.base / "config.json").read_text())
    assert case.patch(untie=True).untied_bytes == 0
    assert json.loads((case.output / "config.json").read_text()) == config
    assert not read_manifest(case.output).untied


def test_a_class_that_vllm_ties_is_untied_by_force_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path)
    output_ND = given_rows(case)
    monkeypatch.setattr(patch_plan, "TIED_IN_VLLM", ("LlamaForCausalLM",))
    with pytest.raises(CheckpointError, match="vLLM ties the head of LlamaForCausalLM to its embedding"):
        case.patch()
    case.patch(untie=True)
    check_untied(case, output_ND)


@pytest.mark.parametrize(("quantised", "expected"), [
    ({"quant_method": "compressed-tensors", "ignore": ["model.layers.0.mlp"]}, ["model.layers.0.mlp", "lm_head"]),
    ({"quant_method": "compressed-tensors", "ignore": ["lm_head"]}, ["lm_head"]),
    ({"quant_method": "fp8"}, ["lm_head"])])
def test_a_separate_head_of_a_quantised_model_is_kept_out_of_it(tmp_path: Path, quantised: Any, expected: Any) -> None:
    case = make_case(tmp_path)
    edit_json(case.base / "config.json", quantization_config=quantised)
    case.patch(untie=True)
    found = json.loads((case.output / "config.json").read_text())["quantization_config"]
    assert found.get("ignore", found.get("modules_to_not_convert")) == expected


def test_a_quantisation_that_would_take_the_head_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    edit_json(case.base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(CheckpointError, match="quantised by bitsandbytes, and a head of its own would be taken"):
        case.patch(untie=True)
    assert not case.output.exists()
    case.patch()
    assert WEIGHTS in {path.name for path in case.output.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_belong_to_no_id_are_hardly_ever_drawn(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """290 ids and 292 rows grow to 296: three rows of the head have no id, and would score 0 as zeros."""
    draw_fewer_texts(monkeypatch)
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 20)
    case = make_case(tmp_path, tied=tied, num_rows=292, dtype=torch.bfloat16)
    make_rows(case.base, case.rows, output=True, writing={"silent_ids": [7, 11]})
    tokens, rows, header = load_rows(case.rows)
    save_rows(case.rows, tokens, Rows(rows.input_ND, -rows.input_ND), header)
    case.patch()
    new = stored(case.output)
    between_D = new[HEAD][[7, 11]].float().mean(0).bfloat16()
    assert torch.equal(new[HEAD][293:], between_D.expand(3, -1))
    assert not new[EMBEDDING][293:].any()
    records = read_manifest(case.output).tensors
    assert (records[HEAD].surplus, records[EMBEDDING].surplus) == ((7, 11), ())
    hidden_PD = torch.randn(1_000, 64)
    logits_PV = hidden_PD @ new[HEAD].float().T
    assert int(logits_PV.argmax(1).max()) < 293  # never on top
    result = verify(case.output, str(case.base))
    assert failed(result) == []
    edit_tensor(case.output, HEAD, set_row(294, 0.0))
    assert "row 294 of lm_head.weight is none of the base's and is not the mean of the rows 7 and 11" in detail(
        verify(case.output, str(case.base)), "new rows plausible")


@pytest.mark.parametrize("ids", [[7, 290], [7, "11"], "7", [], None])
def test_silent_ids_that_cannot_be_leave_zeros(tmp_path: Path, ids: Any) -> None:
    case = make_case(tmp_path, tied=False, num_rows=292)
    make_rows(case.base, case.rows, output=True, writing={"silent_ids": ids})
    case.patch()
    assert not stored(case.output)[HEAD][293:].any()
    assert read_manifest(case.output).tensors[HEAD].surplus == ()
