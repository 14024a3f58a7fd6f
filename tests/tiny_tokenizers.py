"""Tiny tokenizers of every supported kind, built in code."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vocabext.tokenizer import SPACE_MARK, BaseTokenizer

SPECIAL = ["<s>", "</s>"]
LLAMA_3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
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


def _space_mark(*, split: bool, byte_fallback: bool) -> Tokenizer:
    """A BPE model on text with marks for spaces, trained with or without cutting at them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    lines = [text.replace("\n", " ") for text in TEXT]  # as in Llama 2, a line break is a byte
    backend.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    vocabulary = backend.get_vocab()
    merges = _merges(backend)
    names = [*(["<unk>"] if byte_fallback else []), *SPECIAL,
             *([f"<0x{b:02X}>" for b in range(256)] if byte_fallback else []), *sorted(vocabulary, key=vocabulary.get)]
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


def crossing() -> Tokenizer:
    """Tokens across spaces, and characters outside the vocabulary vanish."""
    backend = _space_mark(split=False, byte_fallback=False)
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
