"""A model's effective tokenizer, to count with: what vLLM will do to a text.

`vocabext.tokenizer` asks more of a tokenizer, that it can be extended. To measure one, being able to
encode is enough.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vocabext.errors import TokenizerError, in_one_line


class Encoder:
    """Encodes text without the special tokens that frame a prompt."""

    def __init__(self, backend: Any, num_ids: int) -> None:
        """Take over the Rust tokenizer of a fast tokenizer of transformers.

        Args:
            backend: A `tokenizers.Tokenizer`; its padding and truncation are switched off.
            num_ids: How many ids there are.
        """
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.num_ids = num_ids

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of many texts, encoded on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def pieces(self, text: str) -> list[tuple[str, int]]:
        """Cut a text where its tokens end.

        Returns:
            (text, token id) pairs. The texts put together are the text. A token that is only some of a
            character's bytes joins the token that completes the character.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        pieces: list[tuple[str, int]] = []
        position = 0
        for token_id, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if end > position:
                pieces.append((text[position:end], int(token_id)))
                position = end
        if position < len(text):  # a normalizer dropped the end
            pieces.append((text[position:], -1))
        return pieces


def load_encoder(folder: Path, *, trust_remote_code: bool = False) -> Encoder:
    """Load the effective tokenizer of a model folder.

    Raises:
        TokenizerError: If there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        raise TokenizerError(f"{folder} has no tokenizer that transformers can load: {in_one_line(error)}") from error
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(f"the tokenizer of {folder} is {type(hf).__name__}, which has no tokenizer.json form")
    return Encoder(backend, len(hf))
