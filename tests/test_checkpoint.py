"""Tests of reading model folders, placing rows, and the rows artifact."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoints import asset_model, edit_header, edit_json, tiny_folder, tiny_model

from vocabext.checkpoint import folder as module
from vocabext.checkpoint.architecture import with_sizes
from vocabext.checkpoint.folder import Rows, load_rows, open_checkpoint, resolve_model, save_rows
from vocabext.checkpoint.shards import read_shard
from vocabext.checkpoint.vocabulary import stored_name
from vocabext.errors import CheckpointError, UsageError
from vocabext.tokens import NewToken

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "tied")


def rewrite(folder: Path, change: Any) -> None:
    """Apply a function to the tensors of a single-file checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# -- what is stored -----------------------------------------------------------------------------------------------

def test_a_tied_checkpoint_is_described(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tied
    assert not checkpoint.sharded
    assert (checkpoint.embedding_name, checkpoint.head_name) == (EMBEDDING, None)
    assert (checkpoint.vocab_size, checkpoint.hidden_size, checkpoint.dtype) == (300, 64, "F32")
    assert checkpoint.names.architecture == "LlamaForCausalLM"
    assert checkpoint.names.num_parameters == tiny_model().num_parameters()
    assert checkpoint.weight_bytes == 4 * checkpoint.names.num_parameters
    assert torch.equal(checkpoint.read(EMBEDDING), load_file(folder / WEIGHTS)[EMBEDDING])


def test_an_untied_sharded_checkpoint_is_described(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_folder(tmp_path / "m", tied=False, sharded=True))
    assert not checkpoint.tied
    assert checkpoint.sharded
    assert len(checkpoint.shards) > 2
    assert checkpoint.vocab_tensors == (EMBEDDING, HEAD)


def test_a_tied_checkpoint_may_store_its_head_only(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.embedding_name, checkpoint.head_name) == (None, HEAD)
    assert checkpoint.tied
    assert checkpoint.vocab_size == 300


def test_a_tied_checkpoint_may_store_both_when_they_are_equal(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert open_checkpoint(folder).vocab_tensors == (EMBEDDING, HEAD)
    rewrite(folder, lambda tensors: tensors[HEAD][7].add_(1))
    with pytest.raises(CheckpointError, match=r"tied to model.embed_tokens.weight, but both are stored and differ"):
        open_checkpoint(folder)


def test_names_are_found_without_the_class_prefix(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensors.update({name.removeprefix("model."): tensors.pop(name)})
                                     for name in list(tensors)])
    assert open_checkpoint(folder).embedding_name == "embed_tokens.weight"


def test_names_are_found_with_another_prefix_unless_two_could_be_meant(folder: Path) -> None:
    names = ["language_model.embed_tokens.weight", "language_model.layers.0.mlp.up_proj.weight"]
    assert stored_name(EMBEDDING, names) == names[0]
    with pytest.raises(CheckpointError, match=r"cannot tell which"):
        stored_name(EMBEDDING, [*names, "other.embed_tokens.weight"])
    # To find them is not enough where transformers would not, and take random rows instead.
    rewrite(folder, lambda tensors: tensors.update({names[0]: tensors.pop(EMBEDDING)}))
    with pytest.raises(CheckpointError, match=r"2 missing .*1 unknown to it \(language_model.embed_tokens.weight\)"):
        open_checkpoint(folder)


def test_an_untied_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", tied=False)
    rewrite(folder, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not tied to the embedding, but it is not stored"):
        open_checkpoint(folder)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(EMBEDDING))
    with pytest.raises(CheckpointError, match=r"stores no model.embed_tokens.weight"):
        open_checkpoint(folder)


def test_another_table_over_the_vocabulary_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.per_token.weight": torch.zeros(300, 8)}))
    with pytest.raises(CheckpointError, match=r"model.per_token.weight also has 300 rows"):
        open_checkpoint(folder)


def test_a_weight_that_has_as_many_rows_by_accident_is_accepted(tmp_path: Path) -> None:
    model = tiny_model(num_rows=96)  # the intermediate size is 96 too
    model.save_pretrained(tmp_path / "m")
    assert open_checkpoint(tmp_path / "m").vocab_size == 96


def test_a_quantised_embedding_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].to(torch.int8)}))
    with pytest.raises(CheckpointError, match="stored as I8, quantised numbers; rows can be added to"):
        open_checkpoint(folder)


def test_a_config_of_another_checkpoint_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=299)
    with pytest.raises(CheckpointError, match=r"vocab_size 299, but model.embed_tokens.weight has 300 rows"):
        open_checkpoint(folder)


def test_an_embedding_of_the_wrong_rank_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({EMBEDDING: torch.zeros(300)}))
    with pytest.raises(CheckpointError, match=r"shape \[300\]"):
        open_checkpoint(folder)


def test_gpt2_names_come_from_its_class(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=1, n_head=2, n_positions=64))
    model.save_pretrained(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.tied
    assert checkpoint.vocab_tensors == ("transformer.wte.weight",)


def test_a_model_nested_in_a_multimodal_wrapper_is_found(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14})
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.names.architecture == "Gemma3ForConditionalGeneration"
    assert checkpoint.tied
    assert checkpoint.vocab_size == 300
    assert len(checkpoint.vocab_tensors) == 1
    changed = with_sizes(checkpoint.config, {"vocab_size": 310})
    assert changed["text_config"]["vocab_size"] == 310
    changed["text_config"]["vocab_size"] = 300
    assert changed == checkpoint.config


@pytest.mark.parametrize(("name", "stored", "rows"), [
    ("tinystories-656k-hd32", EMBEDDING, 2048), ("tinystories-656k", HEAD, 2048),
    ("stories260K-hd32", EMBEDDING, 512), ("biomed-13m", EMBEDDING, 32000)])
def test_real_models_are_described(name: str, stored: str, rows: int) -> None:
    checkpoint = open_checkpoint(asset_model(name))
    assert checkpoint.tied
    assert checkpoint.vocab_tensors == (stored,)
    assert checkpoint.vocab_size == rows


# -- damaged folders ----------------------------------------------------------------------------------------------

def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        resolve_model(str(folder))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|holds a JSON list)"):
        open_checkpoint(folder)


def test_an_unknown_architecture_is_one_line(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="no-such-type", architectures=["NoSuchModel"])
    with pytest.raises(CheckpointError, match=r"no-such-type") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"safetensors only"):
        open_checkpoint(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no weights to extend"):
        open_checkpoint(folder)


def test_two_sets_of_weights_are_refused(folder: Path) -> None:
    (folder / module.INDEX_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match=r"remove one"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", sharded=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {shard.name}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "..", "sub/x.safetensors", 3])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, file: Any) -> None:
    folder = tiny_folder(tmp_path / "m", sharded=True)
    save_file({EMBEDDING: torch.zeros(300, 64)}, tmp_path / "outside.safetensors")
    index = json.loads((folder / module.INDEX_NAME).read_text())
    index["weight_map"][EMBEDDING] = file
    (folder / module.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"no plain file name"):
        open_checkpoint(folder)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", sharded=True)
    index = json.loads((folder / module.INDEX_NAME).read_text())
    old = index["weight_map"][EMBEDDING]
    index["weight_map"][EMBEDDING] = next(file for file in index["weight_map"].values() if file != old)
    (folder / module.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"it is not there"):
        open_checkpoint(folder)
    del index["weight_map"][EMBEDDING]
    (folder / module.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"holds {EMBEDDING}"):
        open_checkpoint(folder)
    (folder / module.INDEX_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weight_map"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_shard_is_refused(folder: Path, keep: int) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|fewer than"):
        open_checkpoint(folder)


@pytest.mark.parametrize("header", [b"\xff" * 40, b"[1]", b'{"a": {}}', b'{"a": {"dtype": "F32", "shape": [-1], '
                                    b'"data_offsets": [0, 4]}}', b'{"a": {"dtype": "F32", "shape": 3, '
                                    b'"data_offsets": [0, 4]}}'])
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(CheckpointError, match=r"damaged safetensors header"):
        read_shard(tmp_path, WEIGHTS)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match=r"announces a header of 1152921504606846976 bytes"):
        read_shard(tmp_path, WEIGHTS)


def test_offsets_that_do_not_fit_are_refused(folder: Path) -> None:
    edit_header(folder / WEIGHTS, lambda header: header[EMBEDDING].update(shape=[300, 63]))
    with pytest.raises(CheckpointError, match=r"shape \[300, 63\] of F32 needs 75600"):
        open_checkpoint(folder)
    edit_header(folder / WEIGHTS, lambda header: header.pop(EMBEDDING))
    with pytest.raises(CheckpointError, match=r"starts at byte|end at byte"):
        open_checkpoint(folder)


@settings(max_examples=examples(200))
@given(st.binary(max_size=120))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw if len(raw) % 2 else raw)
    with contextlib.suppress(CheckpointError):
        read_shard(folder, WEIGHTS)


# -- hub ids ------------------------------------------------------------------------------------------------------

def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UsageError, match=r"is a file"):
        resolve_model(str(tmp_path / "file.txt"))
    with pytest.raises(UsageError, match=r"does not exist"):
        resolve_model("./no/such/folder")


def test_a_typing_error_in_a_relative_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="the model folder models/typo does not exist"):
        resolve_model("models/typo")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"org/model is no folder here, and it cannot be had from") as caught:
        resolve_model("org/model")
    assert "\n" not in str(caught.value)


def test_a_hub_download_takes_no_pickles(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        seen.update(options, model=model)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/model") == folder
    assert seen["model"] == "org/model"
    assert "*.bin" in seen["ignore_patterns"]
    assert not any("bin" in pattern or "pt" in pattern for pattern in seen["allow_patterns"])


# -- rows -------------------------------------------------------------------------------------------------------------

TOKENS = (NewToken(" heart", "Ġheart", (5, 6), 3, 3), NewToken(" é\n", "ĠÃ©Ċ", (5, 7, 8)))


@pytest.mark.parametrize("output", [None, torch.ones(2, 4)])
def test_rows_survive_the_file(tmp_path: Path, output: torch.Tensor | None) -> None:
    save_rows(tmp_path / "r.safetensors", TOKENS, Rows(torch.rand(2, 4).to(torch.bfloat16), output), {"method": "mean"})
    tokens, rows, header = load_rows(tmp_path / "r.safetensors")
    assert tokens == TOKENS
    assert header["method"] == "mean"
    assert rows.input_ND.dtype == torch.float32
    assert rows.input_ND.shape == (2, 4)
    assert (rows.output_ND is None) == (output is None)
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]


def test_a_file_that_is_no_rows_file_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist"):
        load_rows(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"none that vocabext distill wrote"):
        load_rows(folder / WEIGHTS)
    (tmp_path / "text").write_text("not a safetensors file at all")
    with pytest.raises(CheckpointError, match=r"no safetensors file"):
        load_rows(tmp_path / "text")


@pytest.mark.parametrize(("metadata", "error"), [
    ({"header": '{"artifact": "rows", "version": 99}', "tokens": "[]"}, "version 99"),
    ({"header": "{", "tokens": "[]"}, "damaged metadata"),
    ({"header": '{"artifact": "rows", "version": 1}', "tokens": "[3]"}, "damaged metadata"),
    ({"header": '{"artifact": "rows", "version": 1}', "tokens": "[]"}, "has 0 tokens, but rows of shape"),
])
def test_damaged_rows_are_refused(tmp_path: Path, metadata: dict[str, str], error: str) -> None:
    save_file({"input": torch.zeros(2, 4)}, tmp_path / "r.safetensors", metadata=metadata)
    with pytest.raises((UsageError, CheckpointError), match=error):
        load_rows(tmp_path / "r.safetensors")


@pytest.mark.parametrize(("rows", "said"), [
    (Rows(torch.rand(3, 4)), r"the input rows have the shape \[3, 4\], but there are 2 tokens"),
    (Rows(torch.rand(2, 4), torch.rand(1, 4)), r"the output rows have the shape \[1, 4\], but there are 2 tokens"),
    (Rows(torch.rand(2, 4), None, torch.rand(2)), "holds no bias"),
])
def test_rows_that_do_not_fit_their_tokens_are_not_written(tmp_path: Path, rows: Rows, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        save_rows(tmp_path / "rows.safetensors", TOKENS, rows, {"method": "mean"})
    assert not (tmp_path / "rows.safetensors").exists()
