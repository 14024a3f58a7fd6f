"""Tiny tokenizers, built in code: one of every kind, and one of every family that people serve.

A *kind* is the least that has a property (`KINDS`). A *family* (`FAMILIES`) has all that the real files of
its models have: normalizer, splits, frame, decoder, and special tokens where theirs stand.
"""

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fuzz import every
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from vocabext.tokenizer import SPACE_MARK, BaseTokenizer

SPECIAL = ["<s>", "</s>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = [
    "The heart muscle pumps the blood, and the blood carries what the heart gives it.",
    "Signs of the old house: a door, a window and the smell of the heart of oak. It's here, isn't it?",
    "He said that there were 12 of them in 1999 (or 2001), and she wasn't sure; so they counted again!",
    "the rate of the muscles is rated by the rest of the heartless raters in the theatre\n\n  and there it rests",
    "a card, a cart, a cat and a cap are on the mat. ha ha ha, that is that; the the the end of this.",
    "print(self.name)\n    return self.value + other.value  # it's a comment",
    "ça été déjà vu: naïve café, Ägypten, שלום, 中文字",
]


def _byte_level(split: str | None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    # As in Llama 3: the special tokens come last, and only stand among the added tokens.
    backend.add_special_tokens(SPECIAL)
    return backend


def _space_mark(*, split: bool, byte_fallback: bool, texts: Sequence[str] = TEXT, size: int = 160) -> Tokenizer:
    """A BPE model on text with marks for spaces, trained with or without cutting at them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    lines = [text.replace("\n", " ") for text in texts]  # as in Llama 2, a line break is a byte
    backend.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    vocabulary = backend.get_vocab()
    merges = _merges(backend)
    names = [*(["<unk>"] if byte_fallback else []), *SPECIAL, *(BYTE_TOKENS if byte_fallback else []),
             *sorted(vocabulary, key=vocabulary.__getitem__)]
    model = models.BPE({name: i for i, name in enumerate(names)}, merges, fuse_unk=byte_fallback,
                       byte_fallback=byte_fallback, unk_token="<unk>" if byte_fallback else None)
    backend = Tokenizer(model)
    backend.add_special_tokens([*(["<unk>"] if byte_fallback else []), *SPECIAL])
    return backend


def _merges(backend: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def gpt2() -> Tokenizer:
    """Byte-level BPE with the split expression that is built in."""
    return _byte_level(None)


def llama3() -> Tokenizer:
    """Byte-level BPE with a split expression, and a BOS in front of a prompt."""
    backend = _byte_level(LLAMA_3_SPLIT)
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B",
                                                           special_tokens=[("<s>", bos)])
    return backend


def metaspace() -> Tokenizer:
    """As transformers makes Llama 2: byte fallback, marks for spaces, nothing cut."""
    backend = _space_mark(split=True, byte_fallback=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    return backend


def prepend() -> Tokenizer:
    """As the file of Llama 2 says: normalizers put the marks."""
    backend = metaspace()
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)])
    return backend


def crossing(texts: Sequence[str] = TEXT, size: int = 160) -> Tokenizer:
    """Tokens across spaces, and characters outside the vocabulary vanish."""
    backend = _space_mark(split=False, byte_fallback=False, texts=texts, size=size)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": gpt2, "llama3": llama3, "metaspace": metaspace, "prepend": prepend, "crossing": crossing}


def as_hf(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@cache
def tiny_base(kind: str) -> BaseTokenizer:
    """A tiny tokenizer of a kind, as a model's folder would give it."""
    return BaseTokenizer(as_hf(KINDS[kind]()))


# ---- families ------------------------------------------------------------------------------------

MORE_TEXT = [
    *TEXT,
    "Сердце бьётся, и кровь идёт по сосудам. Сосуды несут кровь от сердца, и сердце качает её.",
    "Η καρδιά χτυπά και το αίμα ρέει. Το αίμα και η καρδιά, η καρδιά και το αίμα.",
    "القلب ينبض والدم يجري في القلب. هذا القلب وهذا الدم في الجسم",
    "הלב פועם והדם זורם בלב. הדם והלב של הגוף, שלום לגוף",
    "दिल धड़कता है और रक्त बहता है। दिल और रक्त, रक्त और दिल है।",
    "หัวใจเต้นและเลือดไหลในหัวใจ เลือดและหัวใจ",
    "心脏跳动，血液流动。心脏和血液，血液和心脏。心臓が動く、血が流れる。",
    "심장이 뛰고 피가 흐른다. 피와 심장, 심장과 피가 흐른다.",
    "5 mg of it, 10 mg of that; 120 mm or 80 mm, 36.6 °C, 5 % and 12 %. 1,000 l/min; 1 g/l",
    "def value(self):\n    if self.other:\n        return self.value\n    return None\n\n\nclass Other:\n\tone = 1\r\n",
    "🙂 ok 🙂 fine 👩 👨 ❤️ ok ❤️ a\u200db",
    string.printable.replace("\x0b", "").replace("\x0c", ""),
]
TEKKEN_SPLIT = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K_SPLIT = TEKKEN_SPLIT.replace(r"\p{M}]+|", r"\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|").replace(
    r"\p{M}]*|", r"\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|").replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN_SPLIT = LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_SPLITS = [
    r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"]
BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"


@dataclass(frozen=True)
class Family:
    """A family of tokenizers.

    Attributes:
        build: Makes a tiny tokenizer of the family.
        named: Special tokens by the names that transformers has for them.
        turn: What stands before and after a message in its chat template.
    """

    build: Callable[[], Tokenizer]
    named: Mapping[str, str]
    turn: tuple[str, str] = ("", "\n")

    def as_hf(self, backend: Tokenizer) -> PreTrainedTokenizerFast:
        """Wrap a tokenizer of this family, base or expanded, as a model's folder would give it."""
        before, after = self.turn
        template = ("{% for m in messages %}{{ BEFORE + m.role + ' ' + m.content + AFTER }}{% endfor %}"
                    "{% if add_generation_prompt %}{{ BEFORE + 'assistant ' }}{% endif %}")
        template = template.replace("BEFORE", repr(before)).replace("AFTER", repr(after))
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **self.named)


@cache
def family_base(name: str) -> BaseTokenizer:
    """The tiny tokenizer of a family, as a model's folder would give it."""
    return BaseTokenizer(FAMILIES[name].as_hf(FAMILIES[name].build()))


def _edited(backend: Tokenizer, edit: Callable[[dict[str, Any]], None]) -> Tokenizer:
    spec = json.loads(backend.to_str())
    edit(spec)
    return Tokenizer.from_str(json.dumps(spec))


def _frame(backend: Tokenizer, before: Sequence[str] = (), after: Sequence[str] = ()) -> Tokenizer:
    """Put special tokens around a prompt."""
    names = [(name, backend.token_to_id(name)) for name in dict.fromkeys([*before, *after])]
    template = processors.TemplateProcessing(single=[*before, "$A", *after], pair=[*before, "$A", *after, "$B", *after],
                                             special_tokens=names)
    if backend.post_processor is None:
        backend.post_processor = template
    else:
        backend.post_processor = processors.Sequence([backend.post_processor, template])
    return backend


def _added(backend: Tokenizer, special: Iterable[str] = (), plain: Iterable[str] = (), **flags: bool) -> Tokenizer:
    """Add special tokens, and tokens that are taken out of a text but stand in decoded text."""
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    backend.add_tokens([AddedToken(name, special=False, **flags) for name in plain])
    return backend


def _bytes_bpe(*steps: pre_tokenizers.PreTokenizer, low: Sequence[str] = (), post: bool = False,
               normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Byte-level BPE on given splits; on the expression that is built in where no step is given."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    backend.decoder = decoders.ByteLevel()
    if post:  # it shifts offsets, so that spaces belong to no token
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.train_from_iterator(MORE_TEXT, trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=list(low)))
    return backend


def _isolated(*expressions: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]


def _llama3() -> Tokenizer:
    """The flag `ignore_merges` is set, and some entries are found only because it is."""
    def without_some_merges(spec: dict[str, Any]) -> None:
        merges = spec["model"]["merges"]
        used = {part for merge in merges for part in merge}
        last = [merge for merge in merges if "".join(merge) not in used][-5:]
        spec["model"].update(ignore_merges=True, merges=[merge for merge in merges if merge not in last])

    backend = _edited(_bytes_bpe(*_isolated(LLAMA_3_SPLIT)), without_some_merges)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    _added(backend, ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(3)),
                     "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    return _frame(backend, ["<|begin_of_text|>"])


def _gpt2() -> Tokenizer:
    return _added(_bytes_bpe(), ["<|endoftext|>"])


def _prefixed(steps: Sequence[pre_tokenizers.PreTokenizer] = (), *, normalized: bool = False, post: bool = False,
              normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """The splitting puts a space in front of a text, and of what follows an added token, if there is none."""
    backend = _bytes_bpe(*steps, normalizer=normalizer)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=not steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    if post:
        backend.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=True)
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=normalized, special=True)])
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=normalized, special=True)])
    return _added(backend, plain=["<sep>"], normalized=normalized, rstrip=True)


def _prefixed_steps(steps: Callable[[dict[str, Any]], list[dict[str, Any]]], *,
                    normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Steps around the byte-level one that is given."""
    def edit(spec: dict[str, Any]) -> None:
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps(spec["pre_tokenizer"])}

    return _edited(_prefixed(normalizer=normalizer), edit)


def _qwen2() -> Tokenizer:
    backend = _added(_bytes_bpe(*_isolated(QWEN_SPLIT), normalizer=normalizers.NFC()),
                     ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</think>"], normalized=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _olmo2() -> Tokenizer:
    """As converters from tiktoken write it: what lies between two matches is thrown away, and there is none."""
    split = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "removed", invert=True)
    return _added(_bytes_bpe(split), ["<|endoftext|>", "<|pad|>"], ["|||EMAIL_ADDRESS|||"])


def _gpt_neox() -> Tokenizer:
    backend = _bytes_bpe(low=["<|endoftext|>", "<|padding|>"], post=True, normalizer=normalizers.NFC())
    return _added(backend, plain=[" " * n for n in range(24, 1, -1)])


def _phi() -> Tokenizer:
    return _added(_gpt2(), plain=[*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1))])


def _deepseek() -> Tokenizer:
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    backend = _bytes_bpe(*_isolated(*DEEPSEEK_SPLITS), low=names, normalizer=normalizers.Sequence([]))
    return _frame(_added(backend, plain=["<think>", "<｜User｜>", "<｜Assistant｜>"], normalized=False), names[:1])


def _tekken() -> Tokenizer:
    low = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{i}>" for i in range(5, 12))]
    backend = _bytes_bpe(*_isolated(TEKKEN_SPLIT), low=low)
    return _frame(_edited(backend, lambda spec: spec["model"].update(ignore_merges=True)), ["<s>"])


def _gpt_oss() -> Tokenizer:
    """Case-aware splits, and special tokens behind a hole in the ids."""
    names = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|end|>"]
    backend = _bytes_bpe(*_isolated(O200K_SPLIT))

    def with_a_hole(spec: dict[str, Any]) -> None:
        spec["model"]["vocab"].update({name: 540 + 2 * i for i, name in enumerate(names)})

    return _added(_edited(backend, with_a_hole), names)


def _starcoder() -> Tokenizer:
    backend = _bytes_bpe(low=["<|endoftext|>", "<fim_prefix>", "<fim_suffix>"])

    def digits_first(spec: dict[str, Any]) -> None:
        digits = {"type": "Digits", "individual_digits": True}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}

    return _edited(backend, digits_first)


def _bloom() -> Tokenizer:
    return _bytes_bpe(*_isolated(BLOOM_SPLIT), low=["<unk>", "<s>", "</s>", "<pad>"], post=True)


def _marks_bpe(low: Sequence[str], *, lines: bool = False, middle: Sequence[str] = (),
               first_merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    """BPE on text with marks for spaces, as SentencePiece trains it: control tokens, bytes, merges, characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.train_from_iterator([text.replace("\n", " ").replace("\r", "").replace("\t", " ") for text in MORE_TEXT],
                                trainers.BpeTrainer(vocab_size=470, show_progress=False))
    vocabulary = backend.get_vocab()
    products = ["".join(pair) for pair in first_merges]
    names = [*low, *BYTE_TOKENS, *middle, *products, *sorted(vocabulary, key=vocabulary.__getitem__)]
    model = models.BPE({name: i for i, name in enumerate(dict.fromkeys(names))}, [*first_merges, *_merges(backend)],
                       fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    return Tokenizer(model)


def _mark_decoder(*, strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


RUNS = [(SPACE_MARK * n, SPACE_MARK * n) for n in (1, 2, 4)]  # real vocabularies hold runs of spaces


def _metaspace(scheme: str, low: Sequence[str] = ("<unk>", "<s>", "</s>")) -> Tokenizer:
    """As the class LlamaTokenizer of transformers rebuilds it; only `never` leaves the text's beginning alone."""
    backend = _added(_marks_bpe(low, first_merges=RUNS), low)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = _mark_decoder(strip=scheme != "never")
    return _frame(backend, ["<s>"])


def cut_at_spaces(*, byte_fallback: bool) -> Tokenizer:
    """As the class SentencePieceBPETokenizer of the tokenizers library makes it: text is cut in front of each mark."""
    backend = _added(_marks_bpe(["<unk>", "<s>", "</s>"]), ["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.decoder = _mark_decoder(strip=True) if byte_fallback else decoders.Metaspace(prepend_scheme="always")
    return _edited(backend, lambda spec: spec["model"].update(byte_fallback=byte_fallback))


def _mistral_v3() -> Tokenizer:
    return _metaspace("first", ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]",
                                *(f"[control_{i}]" for i in range(8, 16))])


def _prepended(*, normalized: bool, rstrip: bool = False) -> Tokenizer:
    """As the file of Llama 2 says. A normalized special token is looked for with a mark in front of it."""
    low = ["<unk>", "<s>", "</s>", *(["<|user|>", "<|assistant|>", "<|end|>"] if rstrip else [])]
    backend = _marks_bpe(low, first_merges=RUNS)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)])
    backend.decoder = _mark_decoder(strip=True)
    backend.add_special_tokens([AddedToken(name, normalized=normalized, rstrip=rstrip and name != "<s>", special=True)
                                for name in low])
    return _frame(backend, ["<s>"])


def _gemma() -> Tokenizer:
    """Nothing in front of a text; runs of spaces and line breaks are tokens that the user defined."""
    low = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    lines, html = ["\n" * n for n in range(1, 5)], ["<table>", "<td>", "</td>"]
    merges = [("\n", "\n"), ("\n", "\n\n"), ("\n\n", "\n\n"), *RUNS, (SPACE_MARK, SPACE_MARK * 2)]
    backend = _marks_bpe(low, middle=[*lines, *html, "\t"], first_merges=merges)
    backend.normalizer = normalizers.Replace(" ", SPACE_MARK)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = _mark_decoder(strip=False)
    _added(backend, low, [*lines, *(SPACE_MARK * n for n in (2, 3, 4)), *html], normalized=False)
    return _frame(backend, ["<bos>"])


def _unigram(low: Sequence[str], normalizer: normalizers.Normalizer, *, words: bool) -> Tokenizer:
    """Unigram on words, or on the whole text, with marks for spaces."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizer
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    steps = [pre_tokenizers.WhitespaceSplit(), metaspace]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if words else metaspace
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(MORE_TEXT, trainers.UnigramTrainer(
        vocab_size=420, unk_token="<unk>", special_tokens=list(low), show_progress=False))
    return backend


def _t5(*, words: bool) -> Tokenizer:
    spaces = [] if words else [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    backend = _unigram(["<pad>", "</s>", "<unk>"], normalizers.Sequence([normalizers.NFKC(), *spaces]), words=words)
    return _frame(_added(backend, [f"<extra_id_{i}>" for i in range(5, -1, -1)]), after=["</s>"])


def _xlm_r() -> Tokenizer:
    backend = _unigram(["<s>", "<pad>", "</s>", "<unk>"], normalizers.NFKC(), words=True)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    return _frame(backend, ["<s>"], ["</s>"])


def _albert() -> Tokenizer:
    normalizer = normalizers.Sequence([
        normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD(),
        normalizers.StripAccents(), normalizers.Lowercase()])
    backend = _unigram(["<pad>", "<unk>", "[CLS]", "[SEP]"], normalizer, words=True)
    backend.add_special_tokens([AddedToken("[MASK]", lstrip=True, normalized=False)])
    return _frame(backend, ["[CLS]"], ["[SEP]"])


_DIGITS = {"type": "Digits", "individual_digits": True}
_END_OF_TEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CHAT_ML = ("<|im_start|>", "<|im_end|>\n")
_INST = ("[INST]", "[/INST]")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(_gpt2, _END_OF_TEXT),
    "gpt2-prefix": Family(lambda: _prefixed(normalized=True), _END_OF_TEXT),
    "roberta": Family(lambda: _prefixed(post=True, normalizer=normalizers.NFC()),
                      {**_END_OF_TEXT, "mask_token": "<mask>"}),
    "llama3": Family(_llama3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
                     ("<|start_header_id|>", "<|eot_id|>")),
    "qwen2": Family(_qwen2, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, _CHAT_ML),
    "olmo2": Family(_olmo2, {**_END_OF_TEXT, "pad_token": "<|pad|>"}),
    "gpt-neox": Family(_gpt_neox, {**_END_OF_TEXT, "pad_token": "<|padding|>"}),
    "phi": Family(_phi, _END_OF_TEXT),
    "deepseek-v3": Family(_deepseek, {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>",
                                      "pad_token": "<｜▁pad▁｜>"}, ("<｜User｜>", "<｜Assistant｜>")),
    "tekken": Family(_tekken, _SENTENCE, _INST),
    "gpt-oss": Family(_gpt_oss, {"bos_token": "<|startoftext|>", "eos_token": "<|return|>",
                                 "pad_token": "<|endoftext|>"}, ("<|start|>", "<|end|>")),
    "starcoder": Family(_starcoder, _END_OF_TEXT),
    "bloom": Family(_bloom, {**_SENTENCE, "pad_token": "<pad>"}),
    "llama2": Family(lambda: _metaspace("first"), _SENTENCE, ("[INST] ", " [/INST] ")),
    "llama2-legacy": Family(lambda: _metaspace("always"), _SENTENCE, ("[INST] ", " [/INST] ")),
    "llama2-no-prefix": Family(lambda: _metaspace("never"), _SENTENCE, ("[INST] ", " [/INST] ")),
    "sentencepiece-bpe": Family(lambda: cut_at_spaces(byte_fallback=True), _SENTENCE),
    "mistral-v1": Family(lambda: _prepended(normalized=True), _SENTENCE, ("<s>[INST] ", " [/INST]</s>")),
    "tinyllama": Family(lambda: _prepended(normalized=False), _SENTENCE, ("<|user|>\n", "</s>\n")),
    "phi3": Family(lambda: _prepended(normalized=False, rstrip=True), _SENTENCE, ("<|user|>\n", "<|end|>\n")),
    "mistral-v3": Family(_mistral_v3, _SENTENCE, _INST),
    "gemma": Family(_gemma, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
                    ("<start_of_turn>", "<end_of_turn>\n")),
    "crossing": Family(lambda: crossing(MORE_TEXT, 600), {"bos_token": "<s>", "eos_token": "</s>"}),
    "t5": Family(lambda: _t5(words=True), {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
    "flan-t5": Family(lambda: _t5(words=False), {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
    "xlm-r": Family(_xlm_r, {**_SENTENCE, "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>",
                             "mask_token": "<mask>"}),
    "albert": Family(_albert, {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "[CLS]",
                               "sep_token": "[SEP]", "mask_token": "[MASK]"}),
}

# What these are once they are built; named here so that no test builds all of them to know its own name.
MERGING = ["llama2", "llama2-legacy", "llama2-no-prefix", "sentencepiece-bpe", "mistral-v1", "tinyllama", "phi3",
           "mistral-v3", "gemma", "crossing"]
UNIGRAM = ["t5", "flan-t5", "xlm-r", "albert"]
CHUNKS = [name for name in FAMILIES if name not in (*MERGING, *UNIGRAM)]
# One for each way of splitting, merging, marking spaces and handling bytes; `make fuzz` takes all of them.
FEW = ["gpt2", "gpt2-prefix", "gpt-neox", "deepseek-v3", "starcoder", "bloom", "llama2", "llama2-no-prefix",
       "sentencepiece-bpe", "gemma", "crossing", "t5", "xlm-r"]
every_family = every("name", FAMILIES, few=FEW)
every_merging_family = every("name", MERGING, few=[name for name in FEW if name in MERGING])
every_family_of_chunks = every("name", CHUNKS, few=[name for name in FEW if name in CHUNKS])

# Other ways in which byte-level BPE gets its space in front of a text.
PREFIXED: dict[str, Family] = {
    "before digits": Family(lambda: _prefixed_steps(lambda last: [last, _DIGITS]), _END_OF_TEXT),
    # Where something is split before, every part of it gets the space.
    "for every part": Family(lambda: _prefixed(_isolated(LLAMA_3_SPLIT)), _END_OF_TEXT),
    "for every part between digits": Family(lambda: _prefixed_steps(lambda last: [_DIGITS, last]), _END_OF_TEXT),
    "marks in bytes": Family(lambda: _prefixed_steps(lambda last: [
        {"type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": "first", "split": True},
        {**last, "add_prefix_space": False, "use_regex": False}]), _END_OF_TEXT),
    "by the normalizer": Family(lambda: _prefixed_steps(lambda last: [{**last, "add_prefix_space": False}],
                                                    normalizer=normalizers.Prepend(" ")), _END_OF_TEXT),
}
