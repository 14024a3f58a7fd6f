"""Tests of `vocabext inspect`."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_checkpoints import asset_model, edit_json, tiny_folder, tiny_model, tiny_tokenizer
from tiny_tokenizers import KINDS, as_hf
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from vocabext.checkpoint.folder import Rows, open_checkpoint, save_rows
from vocabext.cli.inspect import inspect as command
from vocabext.errors import CheckpointError, UsageError
from vocabext.inspect import _quantisation, _tokenizer_warning, inspect_model
from vocabext.patch.stage import patch
from vocabext.tokenizer import load_tokenizer


def test_a_tied_model_is_described(tmp_path: Path) -> None:
    found = inspect_model(str(tiny_folder(tmp_path / "m")))
    assert (found.num_rows, found.num_used_ids, found.num_free_rows, found.hidden_size) == (300, 290, 10, 64)
    assert (found.tied, found.dtype, found.num_shards, found.bytes_per_new_row) == (True, "F32", 1, 256)
    assert found.architecture == "LlamaForCausalLM"
    assert found.num_parameters == tiny_model().num_parameters()
    assert found.tokenizer_kind == "chunks"
    assert "words and phrases can be added" in found.extension
    assert (found.num_new_tokens, found.base) == (0, None)


def test_an_untied_sharded_model_pays_for_both_tensors(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", tied=False, sharded=True, dtype=torch.bfloat16)
    found = inspect_model(str(folder))
    assert (found.tied, found.dtype, found.bytes_per_new_row) == (False, "BF16", 2 * 2 * 64)
    assert found.num_shards == len(list(folder.glob("*.safetensors"))) > 1


def test_an_expanded_checkpoint_is_recognised(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    tokens = (load_tokenizer(str(base)).new_token(" cardiac"),)
    save_rows(tmp_path / "rows", tokens, Rows(torch.zeros(1, 64)), {})
    patch(tmp_path / "rows", str(base), tmp_path / "new")
    found = inspect_model(str(tmp_path / "new"))
    assert (found.num_new_tokens, found.base, found.num_used_ids) == (1, str(base), 291)
    assert "yes: 1 new tokens over" in CliRunner().invoke(command, [str(tmp_path / "new")]).stdout


def test_a_tokenizer_that_cannot_be_extended_is_a_finding(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tiny_folder(tmp_path / "m")
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    found = inspect_model(str(folder))
    assert (found.tokenizer_kind, found.num_used_ids, found.num_free_rows) == (None, None, None)
    assert found.extension.startswith("none: this is a WordPiece tokenizer")
    assert "cannot be extended" in CliRunner().invoke(command, [str(folder)]).stdout


def test_a_folder_without_a_tokenizer_is_a_finding(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "m")
    found = inspect_model(str(tmp_path / "m"))
    assert found.tokenizer_kind is None
    assert found.extension.startswith("none: ")


def test_bad_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        inspect_model(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        inspect_model(str(tmp_path))
    folder = tiny_folder(tmp_path / "m")
    edit_json(folder / "config.json", vocab_size=301)
    with pytest.raises(CheckpointError, match="vocab_size 301"):
        inspect_model(str(folder))


def test_the_command_writes_a_table_or_json(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    run = CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert run.exit_code == 0
    for line in ("architecture", "LlamaForCausalLM", "ids in use", "290", "tied to the embedding", "1 file"):
        assert line in run.stdout
    document = json.loads(CliRunner().invoke(command, [str(folder), "--json"], catch_exceptions=False).stdout)
    assert document["num_free_rows"] == 10
    assert document["vocab_tensors"] == list(open_checkpoint(folder).vocab_tensors)


def test_every_tensor_with_a_row_per_token_is_named_with_its_role(tmp_path: Path) -> None:
    found = inspect_model(str(tiny_folder(tmp_path / "m", tied=False, num_rows=296)))
    assert [(row.role, row.num_rows, row.row_bytes) for row in found.row_tensors] == [
        ("embedding", 296, 256), ("head", 296, 256)]
    assert (found.row_step, found.model_type, found.text_model_type) == (8, "llama", None)
    assert inspect_model(str(tiny_folder(tmp_path / "odd", num_rows=291))).row_step == 1


@pytest.mark.parametrize(("settings", "said"), [
    ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"), ({"quant_method": "fp8"}, "fp8"),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
     "compressed-tensors, 8 bits"),
])
def test_a_quantised_model_tells_how(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    assert _quantisation({"quantization_config": settings}) == said
    assert _quantisation({"text_config": {"quantization_config": settings}}) == said
    assert _quantisation({"text_config": {}}) is None


def test_a_model_inside_a_wrapper_is_described(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    text = Gemma3TextConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=64)
    vision = SiglipVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                image_size=28, patch_size=14)
    Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
                                   ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    found = inspect_model(str(folder))
    assert (found.model_type, found.text_model_type) == ("gemma3", "gemma3_text")
    assert (found.tied, found.num_rows, found.num_free_rows) == (True, 320, 30)
    run = CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert "(type gemma3 around a language model of type gemma3_text)" in run.stdout


@pytest.mark.parametrize(("name", "warns"), [
    ("LlamaTokenizerFast", True), ("LlamaTokenizer", True), ("PreTrainedTokenizerFast", False), (None, False)])
def test_a_tokenizer_class_that_breaks_the_base_itself_is_a_warning(
    tmp_path: Path, name: str | None, warns: bool
) -> None:
    folder = tiny_folder(tmp_path / "m", num_rows=448)
    as_hf(KINDS["llama3"]()).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class=name)
    run = CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert ('breaks tokenizer.json: "The quick' in run.stderr) == warns
    assert ("set tokenizer_class to PreTrainedTokenizerFast" in run.stderr) == warns


def test_a_class_that_cuts_otherwise_without_losing_text_is_said(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    written = json.loads((folder / "tokenizer.json").read_text())
    written["model"]["merges"] = []
    tokenizer = load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text(json.dumps(written))
    warning = _tokenizer_warning(folder, tokenizer)
    assert warning is not None
    assert warning.startswith("transformers cuts text otherwise as ")
    assert warning.endswith("vocabext goes by transformers, as vLLM does")


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize(("name", "rows"), [
    ("tinystories-656k-hd32", 2048), ("stories260K-hd32", 512), ("biomed-13m", 32000)])
def test_real_models_are_described(name: str, rows: int) -> None:
    found = inspect_model(str(asset_model(name)))
    assert (found.num_rows, found.num_used_ids, found.num_free_rows) == (rows, rows, 0)
    assert found.tied
    assert found.tokenizer_kind == "whole text"


@pytest.mark.assets
def test_an_expansion_that_cannot_be_extended_again_still_tells_its_ids(tmp_path: Path) -> None:
    base = asset_model("stories260K-hd32")
    tokens = (load_tokenizer(str(base)).new_token(" caterpillar"),)
    save_rows(tmp_path / "rows", tokens, Rows(torch.zeros(1, 64)), {})
    patch(tmp_path / "rows", str(base), tmp_path / "new")
    found = inspect_model(str(tmp_path / "new"))
    assert (found.num_used_ids, found.num_free_rows, found.num_new_tokens) == (513, 63, 1)
