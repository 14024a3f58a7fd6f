"""Texts at which the `tokenizers` library gives up.

Its regex engine stops after ten million steps back in one match, which some split expressions reach in a row of ten
million spaces. The library then panics: it raises an exception that is no `Exception`, and writes a line to stderr.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Encoding, Tokenizer

from vocabext.errors import TokenizerError

SHOWN_CHARACTERS = 20


@contextmanager
def encoding(texts: Sequence[str]) -> Iterator[None]:
    """Name the text at which the tokenizer gives up in this block: of several, the longest.

    Raises:
        TokenizerError: If the library panics.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        longest = max(texts, key=len, default="")
        raise TokenizerError(
            f"the tokenizer gave up ({error}) at {'one' if len(texts) > 1 else 'a text'}"
            f"{f' of {len(texts):,} texts, probably the longest' * (len(texts) > 1)}: {len(longest):,} characters that "
            f"begin with {longest[:SHOWN_CHARACTERS]!r}; cut it into shorter texts, or leave it out") from None


def encode_with_places(backend: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """Encode many texts with words and places, without the special tokens that frame a prompt.

    Raises:
        TokenizerError: If the library gives up at a text.
    """
    with encoding(texts):
        return list(backend.encode_batch(list(texts), add_special_tokens=False))
