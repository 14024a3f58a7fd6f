"""What transformers and vLLM load from a base folder, and from the folder of its expanded tokenizer."""

import base64
import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hard_texts import FRAGMENTS, possible
from tiny_checkpoints import edit_json, tiny_folder
from tiny_expanded import new_tokens
from tiny_families import tiny_family
from tiny_tokenizers import FAMILIES, MORE_TEXT, TEKKEN_SPLIT
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vocabext.checkpoint.folder import Rows, save_rows
from vocabext.checkpoint.rows import mean_rows
from vocabext.errors import TokenizerError
from vocabext.model.frozen import load_model
from vocabext.patch.stage import patch
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend, load_tokenizer, save_expanded

Files = Mapping[str, bytes]
TEXTS = [f"The {fragment}. {fragment} <0x0A>" for fragment in FRAGMENTS[::5]]
TURNS = [{"role": "user", "content": " cardiac signs and symptoms"}, {"role": "assistant", "content": "5 mg/dL\n"}]


@dataclass(frozen=True)
class Case:
    """A base folder.

    Attributes:
        model_type: What its config.json says.
        files: Makes the files of its tokenizer.
        tokenizer_config: The content of tokenizer_config.json.
        loses: Why the expanded folder would lose the new tokens, if it would.
    """

    model_type: str
    files: Callable[[], Files]
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    loses: str = ""


def as_json(family: str) -> Callable[[], Files]:
    """The one file that most folders have."""
    return lambda: {"tokenizer.json": FAMILIES[family].build().to_str().encode()}


def as_vocabulary(family: str) -> Callable[[], Files]:
    """The two files of GPT-2."""
    def files() -> Files:
        model = json.loads(FAMILIES[family].build().to_str())["model"]
        merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""])
        return {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode()}

    return files


@cache
def sentencepiece(**options: Any) -> bytes:
    """Train a tiny model of SentencePiece."""
    module = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    module.SentencePieceTrainer.train(sentence_iterator=iter(MORE_TEXT), model_writer=out, hard_vocab_limit=False,
                                      minloglevel=2, **options)
    return out.getvalue()


def as_llama_model() -> Files:
    return {"tokenizer.model": sentencepiece(
        model_type="bpe", vocab_size=620, byte_fallback=True, character_coverage=0.99,
        normalization_rule_name="identity", remove_extra_whitespaces=False)}


def as_gemma_model() -> Files:
    return {"tokenizer.model": sentencepiece(
        model_type="bpe", vocab_size=640, byte_fallback=True, character_coverage=0.99, add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols="<mask>,<start_of_turn>,<end_of_turn>,\n,\n\n,▁▁,▁▁▁")}


def as_unigram_model(name: str, **ids: Any) -> Callable[[], Files]:
    return lambda: {name: sentencepiece(model_type="unigram", vocab_size=330, **ids)}


def tekken() -> bytes:
    """The file of Mistral's own tokenizers, in its old form: special tokens are implied."""
    words = [bytes([byte]) for byte in range(256)] + [b" t", b"he", b" the", b"ar", b"ea"]
    vocabulary = [{"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
                  for i, word in enumerate(words)]
    config = {"pattern": TEKKEN_SPLIT, "num_vocab_tokens": len(words), "default_vocab_size": len(words) + 24,
              "default_num_special_tokens": 24, "version": "v3"}
    return json.dumps({"config": config, "vocab": vocabulary}).encode()


def with_files(files: Callable[[], Files], more: Files) -> Callable[[], Files]:
    return lambda: {**files(), **more}


def named(family: str, tokenizer_class: str | None = None, **flags: Any) -> dict[str, Any]:
    """The tokenizer_config.json of a family."""
    names = {**FAMILIES[family].named, **flags}
    return {**names, "tokenizer_class": tokenizer_class} if tokenizer_class else names


CASES = {
    "gpt2 json": Case("gpt2", as_json("gpt2"), named("gpt2", "GPT2Tokenizer")),
    "gpt2 files": Case("gpt2", as_vocabulary("gpt2"), named("gpt2", "GPT2Tokenizer", unk_token="<|endoftext|>")),
    "gpt2 files, space in front": Case("gpt2", as_vocabulary("gpt2"), named("gpt2", "GPT2Tokenizer",
                                                                            add_prefix_space=True)),
    "gpt2 json, space in front": Case("gpt2", as_json("gpt2-prefix"), named("gpt2", "PreTrainedTokenizerFast")),
    "roberta json": Case("roberta", as_json("roberta"), named("roberta", "PreTrainedTokenizerFast",
                                                              add_prefix_space=True)),
    "gpt2 files, no class": Case("gpt2", as_vocabulary("gpt2")),
    "opt files, bos": Case("opt", as_vocabulary("gpt2"), named("gpt2", "GPT2Tokenizer", add_bos_token=True,
                                                               errors="replace")),
    "llama3 json": Case("llama", as_json("llama3"), named("llama3", "PreTrainedTokenizerFast")),
    "qwen3 json": Case("qwen3", as_json("qwen2"), named("qwen2", "Qwen2Tokenizer", add_prefix_space=False)),
    "qwen3 files": Case("qwen3", as_vocabulary("qwen2"), named("qwen2", "Qwen2Tokenizer", errors="replace",
                                                               additional_special_tokens=["<|im_start|>"])),
    "qwen2 json": Case("qwen2", as_json("qwen2"), named("qwen2", "Qwen2Tokenizer")),
    "qwen2 files": Case("qwen2", as_vocabulary("qwen2"), named("qwen2", "Qwen2Tokenizer")),
    "qwen2 json, plain class": Case("qwen2", as_json("qwen2"), named("qwen2", "PreTrainedTokenizerFast")),
    "qwen3.5 json": Case("qwen3_5_text", as_json("qwen2"), named("qwen2", "Qwen2Tokenizer")),
    "qwen3.5 moe json": Case("qwen3_5_moe_text", as_json("qwen2"), named("qwen2", "Qwen2Tokenizer")),
    "olmo2 json": Case("olmo2", as_json("olmo2"), named("olmo2", "GPT2Tokenizer")),
    "gpt-neox json": Case("gpt_neox", as_json("gpt-neox"), named("gpt-neox", "GPTNeoXTokenizerFast")),
    "gpt-neox json, bos": Case("gpt_neox", as_json("gpt-neox"), named("gpt-neox", "GPTNeoXTokenizer",
                                                                      add_bos_token=True, add_eos_token=True)),
    "phi json": Case("phi", as_json("phi"), named("phi", "CodeGenTokenizer")),
    "deepseek json": Case("deepseek_v3", as_json("deepseek-v3"), named("deepseek-v3", "LlamaTokenizerFast",
                                                                       add_bos_token=True, legacy=True)),
    "gpt-oss json": Case("gpt_oss", as_json("gpt-oss"), named("gpt-oss", "PreTrainedTokenizerFast")),
    "starcoder json": Case("starcoder2", as_json("starcoder"), named("starcoder", "GPT2TokenizerFast")),
    "bloom json": Case("bloom", as_json("bloom"), named("bloom", "BloomTokenizerFast")),
    "tekken json": Case("mistral", as_json("tekken"), named("tekken", "PreTrainedTokenizerFast")),
    "tekken json, another class": Case("mistral", as_json("tekken"), named("tekken", "LlamaTokenizerFast")),
    "tekken file": Case("llama", lambda: {"tekken.json": tekken()}, {"tokenizer_class": "TokenizersBackend"}),
    "llama2 json": Case("llama", as_json("llama2"), named("llama2", "LlamaTokenizer")),
    "llama2 json, file of its own": Case("llama", as_json("mistral-v1"), named("mistral-v1", "LlamaTokenizer",
                                                                               legacy=False)),
    "llama2 model": Case("llama", as_llama_model, named("llama2", "LlamaTokenizer", sp_model_kwargs={})),
    "llama2 model, legacy": Case("llama", as_llama_model, named("llama2", "LlamaTokenizer", legacy=True)),
    "llama2 model, no prefix": Case("llama", as_llama_model, named("llama2", "LlamaTokenizer",
                                                                   add_prefix_space=False)),
    "llama2 model, eos": Case("llama", as_llama_model, named("llama2", "LlamaTokenizer", add_bos_token=False,
                                                             add_eos_token=True)),
    "llama2 json and model": Case("llama", with_files(as_json("llama2"), {"tokenizer.model": b"old"}),
                                  named("llama2", "LlamaTokenizer")),
    "mistral v1 json": Case("mistral", as_json("mistral-v1"), named("mistral-v1", "LlamaTokenizer")),
    "mistral v3 json": Case("mistral", as_json("mistral-v3"), named("mistral-v3", "LlamaTokenizer", legacy=False)),
    "mistral model": Case("mistral", as_llama_model, named("mistral-v1", "LlamaTokenizer")),
    "tinyllama json": Case("llama", as_json("tinyllama"), named("tinyllama", "LlamaTokenizer")),
    "phi3 json": Case("phi3", as_json("phi3"), named("phi3", "LlamaTokenizer", add_bos_token=False)),
    "gemma json": Case("gemma", as_json("gemma"), named("gemma", "GemmaTokenizer", add_bos_token=True)),
    "gemma2 json": Case("gemma2", as_json("gemma"), named("gemma", "GemmaTokenizerFast")),
    "gemma model": Case("gemma", as_gemma_model, named("gemma", "GemmaTokenizer", sp_model_kwargs={},
                                                       spaces_between_special_tokens=False)),
    "t5 json": Case("t5", as_json("t5"), named("t5", "T5Tokenizer", extra_ids=6)),
    "t5 model": Case("t5", as_unigram_model("spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
                     named("t5", "T5Tokenizer", extra_ids=6)),
    "xlm-r json": Case("xlm-roberta", as_json("xlm-r"), named("xlm-r", "XLMRobertaTokenizer")),
    "xlm-r model": Case("xlm-roberta", as_unigram_model("sentencepiece.bpe.model"),
                        named("xlm-r", "XLMRobertaTokenizer")),
    "albert json": Case("albert", as_json("albert"), named("albert", "AlbertTokenizer")),
    "albert model": Case("albert", as_unigram_model("spiece.model", pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
                                                    control_symbols="[CLS],[SEP],[MASK]"),
                         named("albert", "AlbertTokenizer")),
}
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


def base_folder(folder: Path, case: Case, **more: bytes) -> Path:
    folder.mkdir()
    for name, content in {**case.files(), **more}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": case.model_type, "vocab_size": 60_000}))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(case.tokenizer_config)))
    return folder


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
    tokens = new_tokens(base)
    tokenizer = load_tokenizer(base)
    header = {"base": {"num_used_ids": tokenizer.first_new_id}, "method": "mean"}
    rows = mean_rows(load_model(base, device="cpu", dtype="float32").embedding_VD, tokens)
    save_rows(tmp_path / "rows.safetensors", tokens, Rows(rows), header)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    expected = extend(tokenizer, tokens)
    for text in ("a muscle of the heart, the heart", "so the muscles are rated <s>"):
        assert loaded.encode(text, add_special_tokens=False) == expected.encode(text)


# ---- vLLM ----------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.slow
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
