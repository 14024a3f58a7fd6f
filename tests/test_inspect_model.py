"""Tests of `vocabext inspect`."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_checkpoints import asset_model, edit_json, tiny_folder, tiny_model

from vocabext.checkpoint import Rows, open_checkpoint, save_rows
from vocabext.cli.inspect import inspect as command
from vocabext.errors import CheckpointError, UsageError
from vocabext.inspect_model import inspect_model
from vocabext.patch import patch
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
    assert (found.num_used_ids, found.num_free_rows, found.num_new_tokens) == (513, 0, 1)
