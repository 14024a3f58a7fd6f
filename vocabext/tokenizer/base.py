"""The effective tokenizer of a base model, and the expanded one that is made from it."""

import json
from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

from vocabext.checkpoint.named_ids import MAX_MISSING_ROWS, NamedIds, Rules
from vocabext.errors import CheckpointError, TokenizerError
from vocabext.tokenizer.chunks import ChunkScheme
from vocabext.tokenizer.panics import encode_with_places, encoding
from vocabext.tokenizer.scheme import EXTENDED_BEFORE, SPACE_MARK, SUPPORTED, Scheme, is_ours, steps_of
from vocabext.tokenizer.unigram.splitting import FINEST_SCALE, UnigramScheme, exact_scores
from vocabext.tokenizer.whole_text import WholeTextScheme, at_marks, never_cuts
from vocabext.tokens import Expansion, NewToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many tokens a message names at most: of those that cannot be added, and of those that break a rule. It counts all.
NUM_NAMED, MAX_NAMED = 10, 3


def plain_copy(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a fast tokenizer, without padding and truncation."""
    backend = Tokenizer.from_str(tokenizer.to_str())
    backend.model = tokenizer.model  # reading the scores of a Unigram model changes some in the last bit
    backend.no_padding()
    backend.no_truncation()
    return backend


class _Encoder:
    """What base and expanded tokenizers share."""

    def __init__(self, backend: Tokenizer, hf: "PreTrainedTokenizerBase") -> None:
        self.backend = backend
        self.hf = hf

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text without a frame: the special tokens around a prompt."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, framed: bool = False) -> list[list[int]]:
        """Encode many texts in parallel; like `encode`, in the order given. Several threads may do so at once.

        `framed` adds the special tokens that frame a prompt.

        Raises:
            TokenizerError: If the library gives up at a text.
        """
        with encoding(texts):
            return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=framed)]

    def encode_with_places(self, texts: Sequence[str]) -> list[Encoding]:
        """Encode many texts with the places of their tokens, without the special tokens that frame a prompt.

        Raises:
            TokenizerError: If the library gives up at a text.
        """
        return encode_with_places(self.backend, texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def untrimmed(self) -> Tokenizer:
        """The tokenizer without the step that frames prompts.

        That step may also trim the places of tokens: it takes one character off for each space that a token spells. If
        the splitting has put the space there, that character is a letter.
        """
        backend = plain_copy(self.backend)
        backend.post_processor = None
        return backend

    @cached_property
    def prefix_ids(self) -> list[int]:
        """The ids that the tokenizer puts in front of a prompt (often BOS, often nothing)."""
        framed, bare = self.backend.encode("a").ids, self.backend.encode("a", add_special_tokens=False).ids
        at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        return list(framed[:at])


class BaseTokenizer(_Encoder):
    """The effective tokenizer of a base model.

    Attributes:
        scheme: What kind it is, and how to extend it.
        named: What the files of its folder say about ids.
        num_own_ids: One more than the highest id that the tokenizer itself has.
    """

    def __init__(self, hf: "PreTrainedTokenizerBase", named: NamedIds | None = None) -> None:
        """Take over a fast tokenizer of transformers.

        Args:
            hf: The tokenizer.
            named: What the files beside it say about ids; None to ignore them.

        Raises:
            TokenizerError: If tokenizers of its kind cannot be extended.
        """
        super().__init__(plain_copy(hf.backend_tokenizer), hf)
        self.scheme = scheme_of(self.backend)
        self.backend = self.scheme.backend
        self.named = named or NamedIds()
        self.num_own_ids = self.scheme.first_new_id
        self.scheme.first_new_id = max(self.num_own_ids, 1 + max(self.reserved, default=-1))
        self._token = cache(self.scheme.new_token)

    @property
    def kind(self) -> str:
        """What this kind of tokenizer is called."""
        return self.scheme.name

    @property
    def vocabulary(self) -> dict[str, int]:
        """Entries of the tokenizer's model to their ids."""
        return self.scheme.vocabulary

    @property
    def added(self) -> dict[str, int]:
        """Contents of added tokens, special ones among them, to their ids."""
        return self.scheme.added

    @property
    def first_new_id(self) -> int:
        """One more than the highest id in use, by the tokenizer or by a file that names it: the first new id."""
        return self.scheme.first_new_id

    @property
    def reserved(self) -> dict[int, str]:
        """Ids behind the tokenizer's own that a file names, with the file and entry; new tokens go behind them."""
        return self.named.reserved(self.num_own_ids)

    @property
    def textless_ids(self) -> list[int]:
        """The ids below `first_new_id` that plain text never has: barriers, and ids without an entry."""
        holes = set(range(self.first_new_id)) - {*self.vocabulary.values(), *self.added.values()}
        return sorted(holes | set(self.scheme.barrier_ids.tolist()))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest entry (L): a text of n characters has at least n / L tokens.

        An entry in the alphabet of bytes has a character for each byte, so it covers no more characters than it has.
        """
        return max(map(len, (*self.vocabulary, *self.added)), default=1)

    def describe(self) -> str:
        """Say in one sentence what kind of tokenizer this is and what can be added to it."""
        return self.scheme.describe()

    def new_token(self, text: str) -> NewToken:
        """Return the new token that stands for a text, or for what the normalizer makes of it.

        Raises:
            TokenizerError: If the text cannot become one token, or would hide a stop or a ban; the message says why.
        """
        token = self._token(text)
        if (reason := self.named.rules.broken_by(token.token, token.run)) is not None:
            raise TokenizerError(f"{text!r} {reason}")
        return token


class ExpandedTokenizer(_Encoder):
    """A base tokenizer with new tokens.

    Attributes:
        expansion: The new tokens and the arithmetic on their ids.
    """

    def __init__(self, backend: Tokenizer, hf: "PreTrainedTokenizerBase", expansion: Expansion) -> None:
        """Wrap an extended backend; use `extend` to make one."""
        super().__init__(backend, hf)
        self.expansion = expansion

    @property
    def tokens(self) -> tuple[NewToken, ...]:
        """The new tokens in token-id order."""
        return self.expansion.tokens

    @property
    def first_new_id(self) -> int:
        """The id of the first new token."""
        return self.expansion.first_new_id


def extend(base: BaseTokenizer, tokens: Sequence[NewToken]) -> ExpandedTokenizer:
    """Add new tokens to a tokenizer so that all other text keeps its ids.

    Args:
        base: The tokenizer to extend; not modified.
        tokens: The new tokens; `tokens[i]` gets the id `base.first_new_id + i`.

    Raises:
        TokenizerError: If a token repeats, belongs to another tokenizer, or cannot be added safely.
    """
    _check_tokens(base, tokens)
    check_rules(base.named.rules, tokens)
    _check_ids(base, len(tokens))
    backend = Tokenizer.from_str(json.dumps(base.scheme.extended(tokens)))
    return ExpandedTokenizer(backend, base.hf, Expansion(tokens, base.first_new_id))


def check_rules(rules: Rules, tokens: Sequence[NewToken]) -> None:
    """Refuse tokens that would hide from generation an id or text that it stops at, bans or forces.

    Raises:
        TokenizerError: If tokens break a rule; says how many, and names the first.
    """
    broken = [(token.token, reason) for token in tokens if (reason := rules.broken_by(token.token, token.run))]
    if broken:
        text, reason = broken[0]
        others = "".join(f", {other!r}" for other, _ in broken[1:MAX_NAMED])
        raise TokenizerError(
            f"{len(broken)} of {len(tokens)} tokens would hide from generation what it stops at or must not write: "
            f"{text!r} {reason}{f'; also{others[1:]}' if others else ''}{', …' * (len(broken) > MAX_NAMED)}; drop them")


def given_rows(base: BaseTokenizer, num_rows: int) -> dict[int, str]:
    """Return the ids that have no row in a matrix of `num_rows`, and that get an empty one, with what they are.

    The model cannot have read or written such an id. If no text holds it (a place for an image, an end of text that
    only a config names), an empty row does no harm.

    Raises:
        CheckpointError: If ids of plain text have no row, or too many ids have none.
    """
    names = {i: content for content, i in {**base.vocabulary, **base.added}.items() if i >= num_rows}
    special = {token["id"] for token in base.scheme.spec["added_tokens"] if token["special"]}
    plain = sorted(names.keys() - special)
    if plain or base.num_own_ids - num_rows > MAX_MISSING_ROWS:
        first = plain[0] if plain else num_rows
        raise CheckpointError(
            f"the tokenizer has {base.num_own_ids} ids but the embedding matrix has only {num_rows} rows: there is "
            f"none for id {first}, {names.get(first, 'a special token')!r}; "
            "this tokenizer belongs to another checkpoint")
    found = {i: f"the special token {content!r}" for i, content in names.items()}
    return dict(sorted({**{i: where for i, where in base.reserved.items() if i >= num_rows}, **found}.items()))


def _check_ids(base: BaseTokenizer, num_new: int) -> None:
    """Refuse so many tokens that one would get an id which a file names, far behind the last row."""
    last = base.first_new_id + num_new - 1
    for i, where in base.named.out_of_reach(base.num_own_ids).items():
        if i <= last:
            raise TokenizerError(f"{where} names the id {i}, and the new tokens would have the ids {base.first_new_id} "
                                 f"to {last}; correct that entry, or take fewer tokens")


def _check_tokens(base: BaseTokenizer, tokens: Sequence[NewToken]) -> None:
    keys: dict[str, NewToken] = {}
    runs: dict[tuple[int, ...], NewToken] = {}
    refused: list[str] = []
    for token in tokens:
        try:
            real = base._token(token.token)
        except TokenizerError as error:
            if base.scheme.extended_before:
                raise
            refused.append(str(error))
            continue
        if (real.key, real.run) != (token.key, token.run):
            raise TokenizerError(f"{token.token!r} stands for {list(real.run)} here, not for {list(token.run)}; "
                                 "these tokens were made for another tokenizer")
        if token.key in keys or token.run in runs:
            other = keys.get(token.key) or runs[token.run]
            raise TokenizerError(f"{token.token!r} and {other.token!r} have the same base ids; keep one of them")
        keys[token.key], runs[token.run] = token, token
    if refused:
        more = f"; and {len(refused) - NUM_NAMED:,} more" if len(refused) > NUM_NAMED else ""
        raise TokenizerError(f"{len(refused):,} of {len(tokens):,} tokens cannot be added to this tokenizer: "
                             f"{'; '.join(refused[:NUM_NAMED])}{more}; leave them out")


def scheme_of(backend: Tokenizer) -> Scheme:
    """Classify a tokenizer by the way in which it can be extended.

    Raises:
        TokenizerError: If its kind cannot be extended; says what it is and what is supported.
    """
    spec: dict[str, Any] = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] == "Unigram":
        if any((score * FINEST_SCALE) % 1 for _, score in model["vocab"]):
            # Readers of tokenizer.json get the last bit of some scores wrong, of others at each reading. Only cuts with
            # equal totals (a row of one sign) depend on that bit; `exact_scores` lets the rule decide them.
            spec = exact_scores(spec)
            scheme = UnigramScheme(Tokenizer.from_str(json.dumps(spec)), spec)
            scheme.description += " (its scores are rounded to 2^-24: rows of one sign may be cut otherwise)"
            return scheme
        return UnigramScheme(backend, spec)
    if model["type"] != "BPE":
        raise TokenizerError(f"this is a {model['type']} tokenizer; supported are {SUPPORTED}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise TokenizerError(f"this BPE tokenizer uses {option}={model[option]!r}; supported are {SUPPORTED}")
    steps = list(steps_of(spec["pre_tokenizer"]))
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return ChunkScheme(backend, spec)
    if any(map(is_ours, steps)):
        raise TokenizerError(EXTENDED_BEFORE)
    marks = any(SPACE_MARK in json.dumps(spec[part], ensure_ascii=False) for part in ("normalizer", "pre_tokenizer"))
    if marks and all(never_cuts(step) or at_marks(step) for step in steps):
        if model.get("ignore_merges"):
            raise TokenizerError("this BPE tokenizer looks whole texts up before it merges (ignore_merges); parts of "
                                 f"a text would be found too after an extension; supported are {SUPPORTED}")
        return WholeTextScheme(backend, spec)
    raise TokenizerError(f"this BPE tokenizer splits by {kinds or 'nothing'}; supported are {SUPPORTED}")
