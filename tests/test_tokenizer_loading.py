"""What transformers and vLLM load from a base folder, and from the folder of its expanded tokenizer."""

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from base_folders import CASES, Case, Files, as_json, base_folder, named, tekken, with_files
from hard_texts import FRAGMENTS, possible
from patch_case import make_rows
from tiny_checkpoints import edit_json, tiny_folder
from tiny_expanded import TOKENS, new_tokens
from tiny_families import tiny_family
from tiny_tokenizers import FAMILIES
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vocabext.errors import TokenizerError
from vocabext.patch.stage import patch
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend, load_tokenizer, save_expanded

TEXTS = [f"The {fragment}. {fragment} <0x0A>" for fragment in FRAGMENTS[::5]]
TURNS = [{"role": "user", "content": " cardiac signs and symptoms"}, {"role": "assistant", "content": "5 mg/dL\n"}]


every_case = pytest.mark.parametrize("case", [
    pytest.param(case, id=name, marks=[pytest.mark.xfail(strict=True, reason=case.loses)] if case.loses else [])
    for name, case in CASES.items()])


@dataclass(frozen=True)
class Pair:
    """A base folder and the folder of its expanded tokenizer, both as transformers loads them."""

    base: BaseTokenizer
    written: ExpandedTokenizer
    base_folder: Path
    folder: Path
    stale: list[str]

    @property
    def old(self) -> PreTrainedTokenizerFast:
        return self.base.hf

    @property
    def new(self) -> PreTrainedTokenizerFast:
        return AutoTokenizer.from_pretrained(self.folder)


def expanded_pair(tmp_path: Path, case: Case, more: Files | None = None) -> Pair:
    """Make both folders; what `save_expanded` does not write or name is carried over, as `patch` does."""
    source, target = base_folder(tmp_path / "base", case, **(more or {})), tmp_path / "new"
    base = load_tokenizer(source)
    new = extend(base, possible(base))
    assert len(new.tokens) > 20
    target.mkdir()
    stale = save_expanded(new, source, target)
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_file() and path.relative_to(source).as_posix() not in stale and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    return Pair(base, new, source, target, stale)


def check_same_ids(pair: Pair, new: PreTrainedTokenizerFast) -> None:
    expansion, used = pair.written.expansion, 0
    for text in TEXTS:
        found = new(text)["input_ids"]
        assert expansion.unmerge(found).tolist() == pair.old(text)["input_ids"]
        assert new.encode(text, add_special_tokens=False) == pair.written.encode(text)
        assert new.decode(found) == pair.old.decode(pair.old(text)["input_ids"])
        used += int(expansion.is_new(found).sum())
    assert used > 10


# ---- all ways in which a base folder comes --------------------------------------------------------


@every_case
def test_what_is_loaded_is_what_was_written(case: Case, tmp_path: Path) -> None:
    pair = expanded_pair(tmp_path, case)
    loaded = json.loads(pair.new.backend_tokenizer.to_str())
    assert loaded == json.loads(pair.written.backend.to_str())
    check_same_ids(pair, pair.new)


SAME = ["special_tokens_map", "model_max_length", "padding_side", "truncation_side", "model_input_names",
        "clean_up_tokenization_spaces", "split_special_tokens", "bos_token_id", "eos_token_id", "pad_token_id",
        "unk_token_id", "all_special_tokens", "all_special_ids", "chat_template"]


@pytest.mark.parametrize("case", [
    pytest.param(case, id=name, marks=[pytest.mark.xfail(
        strict=True, reason=case.loses)] if case.loses else []) for name, case in CASES.items()])
def test_everything_else_is_the_same(case: Case, tmp_path: Path) -> None:
    flags = {"model_max_length": 2048, "padding_side": "left", "truncation_side": "left"}
    pair = expanded_pair(tmp_path, Case(case.model_type, case.files, {**case.tokenizer_config, **flags}))
    new = pair.new
    found = {name: getattr(new, name, None) for name in SAME}
    assert found == {name: getattr(pair.old, name, None) for name in SAME}
    assert (new.model_max_length, new.padding_side) == (2048, "left")


@pytest.mark.parametrize("name", ["gpt2 files", "qwen3 files", "tekken file", "llama2 model", "llama2 json and model"])
def test_files_of_the_old_tokenizer_are_named_and_gone(name: str, tmp_path: Path) -> None:
    pair = expanded_pair(tmp_path, CASES[name])
    old = {path.name for path in pair.base_folder.iterdir()} - {"config.json", "tokenizer_config.json",
                                                                "tokenizer.json"}
    assert old
    assert set(pair.stale) == old
    assert {path.name for path in pair.folder.iterdir()} == {"config.json", "tokenizer_config.json", "tokenizer.json"}


# ---- chat templates ------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
OTHER = TEMPLATE.replace("role", "role | upper")


@pytest.mark.parametrize(
    ("config", "files", "names"),
    [
        ({"chat_template": TEMPLATE}, {}, [None]),
        ({}, {"chat_template.jinja": TEMPLATE.encode()}, [None]),
        ({"chat_template": OTHER}, {"chat_template.jinja": TEMPLATE.encode()}, [None]),
        ({"chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": OTHER}]}, {},
         ["default", "tools"]),
        ({}, {"chat_template.jinja": TEMPLATE.encode(), "additional_chat_templates/tools.jinja": OTHER.encode()},
         ["default", "tools"]),
    ],
    ids=["in the config", "in a file", "in both", "several in the config", "several files"],
)
def test_chat_templates_are_kept(config: dict[str, Any], files: Files, names: list[str | None],
                                 tmp_path: Path) -> None:
    case = CASES["qwen3 json"]
    pair = expanded_pair(tmp_path, Case(case.model_type, with_files(case.files, files),
                                        {**case.tokenizer_config, **config}))
    assert pair.old.chat_template is not None
    assert pair.new.chat_template == pair.old.chat_template
    for name in names:
        found, wanted = (hf.apply_chat_template(TURNS, chat_template=name, return_dict=False)
                         for hf in (pair.new, pair.old))
        assert pair.written.expansion.unmerge(found).tolist() == wanted
        assert len(found) < len(wanted)


# ---- special tokens that other files name --------------------------------------------------------


def decoder(family: str) -> dict[str, Any]:
    """The record of added tokens that tokenizer_config.json had before tokenizer.json was enough."""
    spec = json.loads(FAMILIES[family].build().to_str())
    return {str(token.pop("id")): token for token in spec["added_tokens"]}


def legacy(files: Files) -> Case:
    """A folder whose record of added tokens makes transformers ignore older files."""
    return Case("qwen3", with_files(as_json("qwen2"), files),
                named("qwen2", "Qwen2Tokenizer", added_tokens_decoder=decoder("qwen2")))


def test_a_map_of_special_tokens_that_did_not_count_does_not_count_now(tmp_path: Path) -> None:
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|im_start|>"}
    pair = expanded_pair(tmp_path, legacy({"special_tokens_map.json": json.dumps(names).encode()}))
    assert pair.old.eos_token == "<|im_end|>"
    assert pair.new.special_tokens_map == pair.old.special_tokens_map


def test_a_map_of_special_tokens_that_counts_counts_on(tmp_path: Path) -> None:
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|im_start|>"}
    case = CASES["qwen3 json"]
    pair = expanded_pair(tmp_path, Case(case.model_type, with_files(
        case.files, {"special_tokens_map.json": json.dumps(names).encode()}), case.tokenizer_config))
    assert pair.old.eos_token == "<|endoftext|>"
    assert pair.new.special_tokens_map == pair.old.special_tokens_map


def test_a_list_of_added_tokens_that_did_not_count_does_not_count_now(tmp_path: Path) -> None:
    pair = expanded_pair(tmp_path, legacy({"added_tokens.json": json.dumps({"<|extra|>": 9999}).encode()}))
    assert "<|extra|>" not in pair.old.get_vocab()
    assert "<|extra|>" not in pair.new.get_vocab()


def test_names_of_special_tokens_of_a_models_own(tmp_path: Path) -> None:
    case = CASES["llama3 json"]
    flags = {"image_token": "<|reserved_special_token_0|>", "additional_special_tokens": ["<|start_header_id|>"],
             "extra_special_tokens": {"audio_token": "<|reserved_special_token_1|>"}}
    pair = expanded_pair(tmp_path, Case("llama", case.files, {**case.tokenizer_config, **flags}))
    assert pair.new.image_token == pair.old.image_token == "<|reserved_special_token_0|>"
    assert pair.new.all_special_tokens == pair.old.all_special_tokens
    assert len(pair.new.all_special_tokens) >= 5


def test_a_tokenizer_file_with_a_version_in_its_name(tmp_path: Path) -> None:
    case = CASES["llama3 json"]
    files = {"tokenizer.4.0.json": FAMILIES["llama3"].build().to_str().encode()}
    flags = {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"]}
    pair = expanded_pair(tmp_path, Case("llama", with_files(case.files, files), {**case.tokenizer_config, **flags}))
    check_same_ids(pair, pair.new)


def test_mistrals_own_model_file_is_named(tmp_path: Path) -> None:
    case = CASES["mistral v3 json"]
    pair = expanded_pair(tmp_path, Case("mistral", with_files(case.files, {"tokenizer.model.v3": b"old"}),
                                        case.tokenizer_config))
    assert pair.stale == ["tokenizer.model.v3"]


def test_a_mistral_folder_with_both_of_its_tokenizers(tmp_path: Path) -> None:
    pytest.importorskip("mistral_common")
    case = CASES["tekken json"]
    pair = expanded_pair(tmp_path, Case("mistral", with_files(case.files, {"tekken.json": tekken()}),
                                        case.tokenizer_config))
    assert pair.stale == ["tekken.json"]
    check_same_ids(pair, pair.new)


def test_what_transformers_says_in_several_lines_is_said_whole_in_one(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    edit_json(folder / "config.json", eos_token_id="290")
    with pytest.raises(TokenizerError, match=r"'eos_token_id'.*with value '290' doesn't match") as refused:
        load_tokenizer(folder)
    assert "\n" not in str(refused.value)


# ---- the whole way -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [
    "llama", "qwen2", "qwen3", "mistral"])
def test_a_patched_checkpoint_keeps_the_new_tokens(model_type: str, tmp_path: Path) -> None:
    base = tiny_family(tmp_path / "base", model_type)
    tokens, tokenizer = new_tokens(base), load_tokenizer(base)
    make_rows(base, tmp_path / "rows.safetensors", tuple(TOKENS))
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    expected = extend(tokenizer, tokens)
    for text in ("a muscle of the heart, the heart", "so the muscles are rated <s>"):
        assert loaded.encode(text, add_special_tokens=False) == expected.encode(text)


# ---- vLLM ----------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.fuzz
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", ["gpt2 files", "gpt2 files, space in front", "llama3 json", "qwen3 json",
                                  "tekken file", "tekken json",
                                  "llama2 model", "mistral v3 json", "gemma json"])
def test_vllm_loads_what_transformers_loads(name: str, tmp_path: Path) -> None:
    from vllm.tokenizers import get_tokenizer

    pair = expanded_pair(tmp_path, CASES[name])
    found = get_tokenizer(str(pair.folder))
    assert isinstance(found, PreTrainedTokenizerFast)
    check_same_ids(pair, found)
    assert found.special_tokens_map == pair.old.special_tokens_map
