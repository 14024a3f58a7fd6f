r"""A byte-level BPE tokenizer that knows general English and nothing else.

A tokenizer is *over-tokenizing* a text when it needs many small tokens for what a reader sees as
one word.  That is what happens to domain text under a general vocabulary, and it is the problem
this project repairs; so the example's tokenizer is trained on a dictionary and a thesaurus, and
never sees a line of Python's documentation.

It is built like the tokenizers of current language models:

1. a split regex cuts the text into word-like pieces (a word takes its leading space with it;
   digits come in groups of three; punctuation and line breaks are separate),
2. every piece becomes bytes, so that no text is ever unknown,
3. byte pairs merge, most frequent first, until the vocabulary is full,
4. the special tokens come last, at the end of the vocabulary, and the begin token is put in front
   of every text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

VOCABULARY_SIZE = 8_192
CONTEXT = 1_024
BEGIN = "<|begin_of_text|>"
END = "<|end_of_text|>"

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or sign before it
    r"|\p{N}{1,3}"  # up to three digits
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation with the line breaks after it
    r"|\s*[\r\n]+"  # line breaks
    r"|\s+(?!\S)"  # blanks, leaving one for the word that follows
    r"|\s+"
)


def train(documents: Iterable[str]) -> Tokenizer:
    """Train the tokenizer.

    Args:
        documents: General English.

    Returns:
        A tokenizer of ``VOCABULARY_SIZE`` tokens, the two special ones last.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (BEGIN, END)])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN}:1 $B:1",
        special_tokens=[(BEGIN, begin)],
    )
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of the begin and the end token."""
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    assert begin is not None
    assert end is not None
    return begin, end


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        tokenizer: A trained tokenizer.
        folder: An existing folder.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": BEGIN,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
