"""Base folders of every kind: which files hold the tokenizer, and what its settings say."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import FAMILIES, MORE_TEXT, TEKKEN_SPLIT

Files = Mapping[str, bytes]


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


def tekken_alone() -> Files:
    """A folder with nothing but Mistral's own file: transformers needs Mistral's library to read it."""
    pytest.importorskip("mistral_common")
    return {"tekken.json": tekken()}


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
    "tekken file": Case("llama", tekken_alone, {"tokenizer_class": "TokenizersBackend"}),
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


def base_folder(folder: Path, case: Case, **more: bytes) -> Path:
    folder.mkdir()
    for name, content in {**case.files(), **more}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": case.model_type, "vocab_size": 60_000}))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(case.tokenizer_config)))
    return folder
