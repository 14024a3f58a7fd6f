"""What each of the three ways of extending a tokenizer must be able to do.

A *scheme* knows one kind of tokenizer: how it turns text into ids, which texts can become a token, and which changes
to its specification make them one. `chunks.py` is for byte-level BPE behind a split expression, `whole_text.py` for
BPE that sees everything, `unigram/` for Unigram.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from vocabext.errors import TokenizerError
from vocabext.tokenizer.look_alikes import look_alike, look_alikes
from vocabext.tokenizer.merges import MergeChain
from vocabext.tokenizer.panics import encode_with_places
from vocabext.tokens import NewToken

SPACE_MARK = "\u2581"
SUPPORTED = ("BPE tokenizers with a split expression (GPT-2, Llama 3, Qwen), BPE tokenizers with a space mark "
             "(Llama 2, Mistral, Gemma), and Unigram tokenizers (XGLM)")

# An extension puts this comment in front of its splitting expressions. A second extension would not see the edges that
# such an expression makes, and could cut its matches.
OURS = "(?#vocabext)"
EXTENDED_BEFORE = "this tokenizer was extended by vocabext already; extend its base with both lists"


@dataclass(frozen=True)
class Units:
    """Token ids of one text and the places where it may be cut.

    Attributes:
        ids: Token ids, shape (T,).
        starts: True where a unit (a word, a run of punctuation, ...) begins, shape (T,).
    """

    ids: npt.NDArray[np.int64]
    starts: npt.NDArray[np.bool_]


class Scheme(ABC):
    """One kind of tokenizer and how it is extended.

    Attributes:
        name: What this kind is called.
        description: One sentence for the user: what it is and what can be added.
        byte_fallback: Whether entries such as `<0x0A>` stand for bytes.
        backend: The tokenizer; never modified.
        spec: Its specification, the content of tokenizer.json; never modified.
        vocabulary: Entries of the model to their ids.
        added: Contents of added tokens (special ones among them) to their ids.
        first_new_id: One more than the highest id in use, or reserved: the first new token has this id.
        extended_before: Whether an extension has changed its splitting.
    """

    name: str
    description: str
    byte_fallback = False

    def __init__(self, backend: Tokenizer, spec: dict[str, Any]) -> None:
        """Index the vocabulary of a tokenizer."""
        self.backend = backend
        self.spec = spec
        entries = spec["model"]["vocab"]
        self.vocabulary: dict[str, int] = dict(entries) if isinstance(entries, dict) else {
            entry: i for i, (entry, _) in enumerate(entries)}
        self.added: dict[str, int] = {a["content"]: a["id"] for a in spec["added_tokens"]}
        self.extended_before = any(map(is_ours, steps_of(spec["pre_tokenizer"])))
        self.first_new_id = 1 + max(*self.vocabulary.values(), *self.added.values(), -1)

    def describe(self) -> str:
        """Say in one sentence what this is and what can be added."""
        return self.description

    def new_token(self, text: str) -> NewToken:
        """Return the new token that stands for a text.

        Raises:
            TokenizerError: If the text cannot become one token in all contexts; the message is the reason.
        """
        if not text:
            raise TokenizerError("the text is empty")
        if held := next((a for a in self.added if a in text), None):
            raise TokenizerError(f"{text!r} contains the added token {held!r}")
        if (found := look_alike(text, self._look_alikes)) is not None:
            raise TokenizerError(f"{text!r} holds {found!r}, which looks like a special token")
        if "\ufffd" in text:
            raise TokenizerError(f"{text!r} contains the character that stands for broken text")
        text, given = self.normalize(text), text
        if not text or self.normalize(text) != text:
            raise TokenizerError(f"this tokenizer turns {given!r} into {text!r}, and that into something else again")
        chunks = self.chunks(text)
        key = "".join(chunks)
        if key in self.vocabulary or key in self.added:
            raise TokenizerError(f"{text!r} is in the vocabulary already")
        run = tuple(i for chunk in chunks for i in self.merge(chunk))
        if len(run) < 2:
            raise TokenizerError(f"{text!r} is one token already")
        if self.spelling(run) != key.encode():
            raise TokenizerError(f"{text!r} has characters that this tokenizer does not know")
        self.check(text, chunks, run)
        return NewToken(text, key, run)

    def normalize(self, text: str) -> str:
        """Return what the normalizer makes of a text that stands inside a longer one."""
        if self.backend.normalizer is None:
            return text
        edge, inside = self._normal("a"), self._normal(f"a{text}a")
        # Some normalizers put something in front of a text, or strip its ends.
        if inside.startswith(edge) and inside.endswith("a") and len(inside) > len(edge):
            return inside[len(edge) : -1]
        return self._normal(text)

    def _normal(self, text: str) -> str:
        return str(self.backend.normalizer.normalize_str(text))

    @abstractmethod
    def chunks(self, text: str) -> list[str]:
        """Return the chunks, spelled as the model sees them, of a text that stands inside a longer one."""

    @abstractmethod
    def check(self, text: str, chunks: list[str], run: tuple[int, ...]) -> None:
        """Search for contexts in which the text, though it is there, would not be cut into its run.

        Raises:
            TokenizerError: If there is one.
        """

    def merge(self, chunk: str) -> list[int]:
        """Return the ids that the model gives to one chunk."""
        return [piece.id for piece in self.backend.model.tokenize(chunk)]

    def entries(self, ids: Iterable[int]) -> list[str]:
        """Return the vocabulary entry of each id; an empty one for an id that has none."""
        return [self.backend.id_to_token(i) or "" for i in ids]

    def byte_of(self, entry: str) -> int | None:
        """Return the byte that an entry such as `<0x0A>` stands for; None for an entry that stands for text."""
        is_byte = self.byte_fallback and len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">")
        return int(entry[3:5], 16) if is_byte else None

    @cached_property
    def has_all_bytes(self) -> bool:
        """Whether each byte has an entry."""
        return all(f"<0x{byte:02X}>" in self.vocabulary for byte in range(256))

    def spelling(self, ids: Sequence[int]) -> bytes:
        """Return the entries of the ids in a row, in UTF-8; an entry that stands for a byte is that byte."""
        return b"".join(entry.encode() if (byte := self.byte_of(entry)) is None else bytes([byte])
                        for entry in self.entries(ids))

    @abstractmethod
    def key_text(self, key: str) -> str:
        """Return the text that a vocabulary entry stands for."""

    @abstractmethod
    def unit_starts(self, encoding: Encoding) -> npt.NDArray[np.bool_]:
        """Tell for each token of an encoding whether a word or phrase may begin there, shape (T,)."""

    def encode_units(self, texts: Sequence[str]) -> list[Units]:
        """Encode many texts and mark where a word or phrase may begin and end."""
        return [Units(np.asarray(e.ids, np.int64), self.unit_starts(e))
                for e in encode_with_places(self.backend, texts)]

    def phrase_may_end(
        self, last_ids: npt.NDArray[np.int64], next_ids: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Tell for pairs of ids whether a phrase that ends with the first may stand in front of the second.

        Args:
            last_ids: Ids at the end of phrases, shape (P,).
            next_ids: The ids that follow, shape (P,); -1 for the end of a text.
        """
        return np.ones(len(last_ids), np.bool_)

    @cached_property
    def barrier_ids(self) -> npt.NDArray[np.int64]:
        """Ids that no new token may contain: added tokens, and the one for unknown characters."""
        return np.asarray(sorted({*self.added.values(), *self.unknown_ids}), np.int64)

    @property
    def unknown_ids(self) -> list[int]:
        """The id of the unknown token, if there is one."""
        unknown = self.spec["model"].get("unk_token")
        return [self.vocabulary[unknown]] if unknown in self.vocabulary else []

    @cached_property
    def _look_alikes(self) -> re.Pattern[str]:
        return look_alikes(self.added)

    # Whether every new token is best made by a merge; if not, `chain().accepts` tells which are.
    only_merges = False

    def chain(self) -> MergeChain | None:
        """Return an empty chain of merges; None if this scheme makes no new token by merges."""
        return None

    @property
    def mergeable_ids(self) -> npt.NDArray[np.bool_]:
        """Tell for each id whether the run of a token that is a merge may hold it, shape (U,)."""
        return np.zeros(self.first_new_id, np.bool_)

    @property
    def spelling_ids(self) -> npt.NDArray[np.bool_]:
        """Tell for each id whether it spells a part of a character that no merge of two entries makes, shape (U,)."""
        return np.zeros(self.first_new_id, np.bool_)

    def is_never_merged(self, character: str) -> bool:
        """Tell whether a new token with this character cannot be a merge."""
        return True

    def merged_from(self, tokens: Sequence[NewToken]) -> list[tuple[int, ...]]:
        """Return for each new token the two ids, base or new, that it is merged from; `()` where it is no merge.

        Args:
            tokens: The new tokens; `tokens[i]` has the id `first_new_id + i`.
        """
        chain = self.chain()
        if chain is None:
            return [()] * len(tokens)
        chain.add_all(tokens)
        ids = self.vocabulary | {token.key: self.first_new_id + i for i, token in enumerate(tokens)}
        return [tuple(ids[part] for part in chain.pairs.get(token.key, ())) for token in tokens]

    def parts(self, tokens: Sequence[NewToken]) -> list[tuple[int, ...]]:
        """Return for each new token the indices of the new tokens that it is merged from."""
        return [tuple(i - self.first_new_id for i in ids if i >= self.first_new_id)
                for ids in self.merged_from(tokens)]

    def searched(self, tokens: Sequence[NewToken]) -> list[NewToken]:
        """Return the new tokens that should be merges and cannot be: a splitting step searches text for them."""
        chain = self.chain()
        return [] if chain is None else [token for token in chain.add_all(tokens) if chain.accepts(token)]

    @abstractmethod
    def extended(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the specification of the tokenizer with the new tokens.

        Args:
            tokens: The new tokens; `tokens[i]` gets the id `first_new_id + i`.

        Raises:
            TokenizerError: If they cannot be added safely.
        """


def word_starts(encoding: Encoding) -> npt.NDArray[np.bool_]:
    """Tell for each token of an encoding whether a chunk of the splitting begins there, shape (T,)."""
    words = np.asarray([-1 if word is None else word for word in encoding.word_ids], np.int64)
    starts = np.ones(len(words), np.bool_)
    starts[1:] = words[1:] != words[:-1]
    return starts


def steps_of(node: dict[str, Any] | None, children: str = "pretokenizers") -> Iterator[dict[str, Any]]:
    """Yield the steps of a pre-tokenizer (or, with `children="decoders"`, of a decoder), sequences taken apart."""
    if node is not None and node["type"] == "Sequence":
        for child in node[children]:
            yield from steps_of(child, children)
    elif node is not None:
        yield node


def split_step(expression: str) -> dict[str, Any]:
    """Return a splitting step, marked as ours, that makes each match of an expression, and each gap, a chunk."""
    return {"type": "Split", "pattern": {"Regex": OURS + expression}, "behavior": "Isolated", "invert": False}


def is_ours(step: dict[str, Any]) -> bool:
    """Tell whether a splitting step was made, or changed, by an extension."""
    return step["type"] == "Split" and step["pattern"].get("Regex", "").startswith(OURS)


def in_sequence(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one pre-tokenizer for several steps; a single step stays alone, since readers compile a sequence twice."""
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}


def copy_of(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a BPE specification whose model and vocabulary may be changed; both share everything else."""
    return {**spec, "model": {**spec["model"], "vocab": dict(spec["model"]["vocab"])}}


def with_new_entries(spec: dict[str, Any], added: dict[str, int], tokens: Sequence[NewToken], first: int) -> None:
    """Put the new tokens into the vocabulary of a BPE model, in place."""
    vocabulary = spec["model"]["vocab"]
    # An added token that is not in the model's vocabulary would be renumbered once it grows.
    vocabulary.update({content: i for content, i in added.items() if content not in vocabulary})
    vocabulary.update({t.key: first + i for i, t in enumerate(tokens)})
