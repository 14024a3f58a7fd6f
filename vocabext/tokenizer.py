"""The effective tokenizer of a model, and its extension by tokens that are merges.

*Effective* means: what `AutoTokenizer.from_pretrained` really does with the folder, not what a file
in it says; model classes rebuild parts of the pipeline from their own code.

Extending changes three things and nothing else: the new strings enter the BPE vocabulary,
`ignore_merges` makes BPE look a whole chunk up before it merges anything, and the pre-tokenizer hands
a new string over as one chunk wherever that cannot disturb its neighbours (`boundaries.py` proves
where). No merge is added or removed, and no AddedToken (those match inside longer words).

This is the only module that imports `tokenizers`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

from vocabext.boundaries import MergeTable, phrase_guard, phrase_probes, prefix_tree, whole_text_guards
from vocabext.errors import TokenizerError, UsageError
from vocabext.expansion import Expansion
from vocabext.records import NewToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The split expression that is built into the ByteLevel pre-tokenizer (GPT-2's).
BYTE_LEVEL_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE_MARK = "\u2581"
# One of every sort of character that a split expression may forget.
GAP_PROBE = ("a Bc 12 ½ ² x_y 'd ’s !? -- € 😀 é e\u0301 \u0301 中文 ไทย שלום ـع "
             "\t \n\n \r\n \u00a0 \u3000 \u200d \x00 \ue000  x ")  # fmt: skip
# Files from which other readers would rebuild the tokenizer without the new tokens.
STALE_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "tekken.json", "spiece.model",
               "sentencepiece.bpe.model", "vocab.txt", "qwen.tiktoken", "tiktoken.model")  # fmt: skip
SUPPORTED = "BPE tokenizers with a split expression (GPT-2, Llama 3, Qwen) or a space mark (Llama 2, Mistral)"

CHUNKS, CHUNKS_WORDS_ONLY, WHOLE_TEXT = "chunks", "chunks, words only", "whole text"
KINDS = {
    CHUNKS: "byte-level BPE on the chunks of one split expression: words and phrases can be added",
    CHUNKS_WORDS_ONLY: "BPE on the chunks of several splitting steps: words can be added, phrases not yet",
    WHOLE_TEXT: "BPE on the whole text with a space mark: words and phrases can be added",
}


def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> "BaseTokenizer":
    """Load the effective tokenizer of a model folder or hub id.

    Raises:
        UsageError: If the folder does not exist.
        TokenizerError: If there is no tokenizer, or one that cannot be extended; says which.
    """
    if isinstance(model, Path) or str(model).startswith((".", "/", "~")):
        if not Path(model).expanduser().is_dir():
            raise UsageError(f"the model folder {model} does not exist")
        model = Path(model).expanduser()
    return BaseTokenizer(_auto_tokenizer(model, trust_remote_code=trust_remote_code))


def _auto_tokenizer(model: str | Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        known = ("tokenizer.json", *STALE_FILES)
        if Path(model).is_dir() and not any((Path(model) / name).is_file() for name in known):
            reason = "there is no tokenizer.json in it; copy the tokenizer files that belong to the model there"
        raise TokenizerError(f"{model} has no tokenizer that transformers can load: {reason}") from error
    if getattr(hf, "backend_tokenizer", None) is None:
        raise TokenizerError(f"the tokenizer of {model} is {type(hf).__name__}, which has no tokenizer.json form; "
                             f"supported are {SUPPORTED}")
    return hf


def check_made_for(header: Mapping[str, Any], base: "BaseTokenizer", path: Path) -> None:
    """Refuse an artifact whose new ids are numbered from another place.

    Args:
        header: The header of the artifact.
        base: The tokenizer that it is to be used with.
        path: The artifact, for the message.

    Raises:
        UsageError: If the header names another number of base ids.
    """
    made_for = header.get("base")
    made_for = made_for if isinstance(made_for, dict) else {}
    recorded = made_for.get("num_used_ids")
    if recorded not in (None, base.num_used_ids):
        raise UsageError(f"{path} was made for {made_for.get('model')} with {recorded} token ids, but this model has "
                         f"{base.num_used_ids}; use the model it was made for, or mine again")


def _plain_backend(hf: "PreTrainedTokenizerBase") -> Tokenizer:
    backend = Tokenizer.from_str(hf.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


@dataclass(frozen=True)
class Units:
    """Token ids of one text and the places where it may be cut.

    Attributes:
        ids: Token ids, shape (T,).
        starts: True where a unit (a word, a run of punctuation, ...) begins, shape (T,).
    """

    ids: npt.NDArray[np.int64]
    starts: npt.NDArray[np.bool_]


class _Encoder:
    """What base and expanded tokenizers share."""

    def __init__(self, backend: Tokenizer, hf: "PreTrainedTokenizerBase") -> None:
        self.backend = backend
        self.hf = hf

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without the special tokens that frame a prompt."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts in parallel; like `encode`, in the order given."""
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Ids that the tokenizer puts in front of a prompt (often BOS, often nothing)."""
        framed, bare = self.backend.encode("a").ids, self.backend.encode("a", add_special_tokens=False).ids
        at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        return list(framed[:at])


class BaseTokenizer(_Encoder):
    """The effective tokenizer of a base model, classified by how it can be extended."""

    def __init__(self, hf: "PreTrainedTokenizerBase") -> None:
        """Take over a fast tokenizer of transformers.

        Raises:
            TokenizerError: If it is of a kind that cannot be extended.
        """
        super().__init__(_plain_backend(hf), hf)
        self.spec: dict[str, Any] = json.loads(self.backend.to_str())
        self.kind = _classify(self.spec)
        self.vocabulary: dict[str, int] = self.spec["model"]["vocab"]
        self.added: dict[str, int] = {a["content"]: a["id"] for a in self.spec["added_tokens"]}
        self.num_used_ids = 1 + max(*self.vocabulary.values(), *self.added.values(), -1)
        self._made: dict[str, NewToken] = {}

    def describe(self) -> str:
        """Say in one sentence what kind of tokenizer this is and what can be added to it."""
        return KINDS[self.kind]

    def new_token(self, text: str) -> NewToken:
        """Return the new token that stands for a text.

        Raises:
            TokenizerError: If the text cannot become one token; the message is the reason.
        """
        if text not in self._made:
            self._made[text] = self._make(text)
        return self._made[text]

    def _make(self, text: str) -> NewToken:
        if not text.strip():
            raise TokenizerError(f"{text!r} is empty or only spaces")
        if any(a in text for a in self.added):
            raise TokenizerError(f"{text!r} contains a special token")
        pieces = self._chunks(text)
        key = "".join(pieces)
        if key in self.vocabulary or key in self.added:
            raise TokenizerError(f"{text!r} is in the vocabulary already")
        run = tuple(i for piece in pieces for i in self._merge(piece))
        if len(run) < 2:
            raise TokenizerError(f"{text!r} is one token already")
        if self._spelling(run) != key.encode():
            raise TokenizerError(f"{text!r} has characters that this tokenizer does not know")
        if self.kind != WHOLE_TEXT and len(pieces) > 1:
            self._check_phrase(text, pieces)
        return NewToken(text, key, run)

    def key_text(self, key: str) -> str:
        """Return the text that a vocabulary entry stands for."""
        if self.kind == WHOLE_TEXT:
            return key.replace(SPACE_MARK, " ")
        return str(decoders.ByteLevel().decode([key])) if self._byte_level else key

    def encode_units(self, texts: Sequence[str]) -> list[Units]:
        """Encode many texts and mark where a token or phrase may begin and end."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)  # the fast one has no words
        return [Units(ids := np.asarray(e.ids, np.int64), self._unit_starts(ids, e.word_ids)) for e in encodings]

    def phrase_may_end(
        self, last_ids: npt.NDArray[np.int64], next_ids: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Tell for pairs of ids whether a phrase that ends with the first is used before the second.

        Args:
            last_ids: Ids at the end of phrases, shape (P,).
            next_ids: The ids that follow; -1 for the end of a text.
        """
        if self.kind == WHOLE_TEXT:
            return np.ones(len(last_ids), np.bool_)
        in_word, refused, space = self._phrase_edges
        at_end = next_ids < 0
        return np.asarray(at_end | np.where(in_word[last_ids], ~refused[next_ids], space[next_ids]))

    @cached_property
    def _phrase_edges(self) -> tuple[npt.NDArray[np.bool_], ...]:
        """For each id: ends in a word; begins with what a word's guard refuses; begins with a space."""
        tables = np.zeros((3, self.num_used_ids), np.bool_)
        for token, i in self.vocabulary.items():
            text = self.key_text(token)
            first, last = text[:1], text[-1:]
            tables[:, i] = (not last.isascii() or last.isalnum(),
                            not first.isascii() or first.isalnum() or first == "'", first == " ")
        return tuple(tables)

    @cached_property
    def barrier_ids(self) -> npt.NDArray[np.int64]:
        """Ids that no new token may contain: added tokens, and bytes of broken characters."""
        unknown = [self.vocabulary[u] for u in [self.spec["model"].get("unk_token")] if u in self.vocabulary]
        fallback = [i for token, i in self.vocabulary.items() if _is_byte_token(token)] if self._byte_fallback else []
        return np.asarray(sorted({*self.added.values(), *unknown, *fallback}), np.int64)

    @property
    def drops_unknown(self) -> bool:
        """Whether characters outside the vocabulary vanish instead of becoming a token."""
        model = self.spec["model"]
        falls_back = self._byte_fallback and all(f"<0x{b:02X}>" in self.vocabulary for b in range(256))
        return self.kind == WHOLE_TEXT and not falls_back and model.get("unk_token") is None

    @cached_property
    def unreachable(self) -> dict[str, int]:
        """Where to cut the vocabulary entries that merges do not produce.

        With `ignore_merges` such an entry would suddenly be found when a chunk spells it: the text
        `<0x0A>` would become a line break. Cutting it at the given place leaves its ids as they are.

        Raises:
            TokenizerError: If there is one that can be a chunk and cannot be cut.
        """
        # Added tokens are taken out of a text before it is split, unless they want to stand alone.
        taken_out = {a["content"] for a in self.spec["added_tokens"] if not a["single_word"]}
        ids = {**self.vocabulary, **self.added}
        entries = [token for token, i in ids.items() if token and self._merge(token) != [i]]
        cuts = {}
        for token in entries:
            if self.kind == WHOLE_TEXT:
                cuts[token] = self._harmless_cut(token, entries)
            elif token not in taken_out and len(self._split(self.key_text(token))) == 1:
                cuts[token] = 0
        if 0 in cuts.values():
            token = next(token for token, cut in cuts.items() if not cut)
            raise TokenizerError(f"the vocabulary entry {token!r} cannot be reached by merges, and would be found "
                                 "in plain text after an extension; this tokenizer cannot be extended safely")
        return cuts

    def _harmless_cut(self, token: str, entries: Sequence[str]) -> int:
        """Return a place between two pieces of an entry, such that neither side is such an entry; 0 for none."""
        ids = self._merge(token)
        return next((cut for cut in range(1, len(token)) if token[:cut] not in entries and token[cut:] not in entries
                     and [*self._merge(token[:cut]), *self._merge(token[cut:])] == ids), 0)

    def _merge(self, chunk: str) -> list[int]:
        return [piece.id for piece in self.backend.model.tokenize(chunk)]

    def _split(self, text: str) -> list[str]:
        return [chunk for chunk, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]

    @property
    def _byte_fallback(self) -> bool:
        return bool(self.spec["model"].get("byte_fallback"))

    @property
    def _byte_level(self) -> bool:
        return any(step["type"] == "ByteLevel" for step in _steps(self.spec["pre_tokenizer"], "pretokenizers"))

    def _unit_starts(self, ids: npt.NDArray[np.int64], word_ids: Sequence[int | None]) -> npt.NDArray[np.bool_]:
        starts = np.ones(len(ids), np.bool_)
        if len(ids) and self.kind != WHOLE_TEXT:
            words = np.asarray([-1 if w is None else w for w in word_ids], np.int64)
            starts[1:] = words[1:] != words[:-1]
        elif len(ids):
            joins_left, joins_right = self._word_edges
            starts[1:] = ~(joins_right[ids[:-1]] & joins_left[ids[1:]])
        return starts

    @cached_property
    def _word_edges(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """For each id: does it begin, and does it end, with a letter, mark or number?"""
        left, right = np.zeros(self.num_used_ids, np.bool_), np.zeros(self.num_used_ids, np.bool_)
        for token, i in self.vocabulary.items():
            left[i], right[i] = _in_word(token[:1]), _in_word(token[-1:])
        left[self.barrier_ids] = right[self.barrier_ids] = False
        return left, right

    def _chunks(self, text: str) -> list[str]:
        """Return the chunks that BPE sees where the text stands inside a longer one."""
        if self.kind == WHOLE_TEXT:
            key = text.replace(" ", SPACE_MARK)
            if (normal := self._normalize(text)) not in (key, SPACE_MARK + key):
                raise TokenizerError(f"the normalizer turns {text!r} into {normal!r}; add that form instead")
            return [key]
        if (normal := self._normalize(text)) != text:
            raise TokenizerError(f"the normalizer turns {text!r} into {normal!r}; add that form instead")
        return self._split(text)

    def _normalize(self, text: str) -> str:
        if self.backend.normalizer is not None:
            text = str(self.backend.normalizer.normalize_str(text))
        return text.replace(" ", SPACE_MARK) if self.kind == WHOLE_TEXT else text

    def _spelling(self, ids: Sequence[int]) -> bytes:
        tokens = (self.backend.id_to_token(i) or "" for i in ids)
        return b"".join(bytes([int(t[3:5], 16)]) if self._byte_fallback and _is_byte_token(t) else t.encode()
                        for t in tokens)

    def _check_phrase(self, text: str, pieces: list[str]) -> None:
        """Search for a continuation that the guard lets pass and that changes how the phrase is cut."""
        if self.kind != CHUNKS:
            raise TokenizerError(f"{text!r} is a phrase, and this tokenizer splits in several steps: words only")
        if text[-1].isspace() or "\n" in text or "\r" in text:
            raise TokenizerError(f"{text!r} ends in a space or contains a line break")
        for probe in phrase_probes(text):
            if self._split(text + probe)[: len(pieces)] != pieces:
                raise TokenizerError(f"{text!r} is cut differently when {probe!r} follows")


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
        tokens: The new tokens; `tokens[i]` gets the id `base.num_used_ids + i`.

    Raises:
        TokenizerError: If a token repeats, belongs to another tokenizer, or cannot be added safely.
    """
    _check_tokens(base, tokens)
    spec = json.loads(base.backend.to_str())
    vocabulary = spec["model"]["vocab"]
    # An added token that is not in the model's vocabulary would be renumbered once it grows.
    vocabulary.update({content: i for content, i in base.added.items() if content not in vocabulary})
    vocabulary.update({t.key: base.num_used_ids + i for i, t in enumerate(tokens)})
    spec["model"]["ignore_merges"] = True
    spec["pre_tokenizer"] = _extended_steps(base, tokens)
    return ExpandedTokenizer(Tokenizer.from_str(json.dumps(spec)), base.hf, Expansion(tokens, base.num_used_ids))


def load_expanded(folder: Path, expansion: Expansion) -> ExpandedTokenizer:
    """Load the tokenizer of an expanded checkpoint as transformers loads it, whatever that turns out to be.

    Args:
        folder: The expanded checkpoint.
        expansion: The new tokens that its manifest names.

    Raises:
        TokenizerError: If transformers cannot load it.
    """
    hf = _auto_tokenizer(folder, trust_remote_code=False)
    return ExpandedTokenizer(_plain_backend(hf), hf, expansion)


def save_expanded(expanded: ExpandedTokenizer, base_folder: Path, folder: Path) -> list[str]:
    """Write the tokenizer into a checkpoint folder and check what transformers makes of it.

    Args:
        expanded: The tokenizer.
        base_folder: The base model's folder, for its tokenizer_config.json.
        folder: An existing folder to write into.

    Returns:
        Names of files of the base that must not be carried over: other readers would rebuild the
        tokenizer from them, without the new tokens.

    Raises:
        TokenizerError: If `AutoTokenizer` would load something else than what was written.
    """
    from transformers import AutoTokenizer

    expanded.backend.save(str(folder / "tokenizer.json"))
    path = base_folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # A model class would rebuild the pre-tokenizer from its own code; this one takes the file as it is.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("auto_map", "added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy"):
        config.pop(name, None)
    hf = expanded.hf
    for name, value in hf.special_tokens_map.items():
        if isinstance(value, str):
            config[name] = value
    config["model_input_names"] = list(hf.model_input_names)
    config["padding_side"] = hf.padding_side
    config["clean_up_tokenization_spaces"] = bool(hf.clean_up_tokenization_spaces)
    if hf.model_max_length < 10**12:
        config["model_max_length"] = hf.model_max_length
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    loaded = AutoTokenizer.from_pretrained(str(folder))
    for part, wanted, found in _differences(expanded.backend, loaded.backend_tokenizer):
        raise TokenizerError(f"transformers loads another {part} than was written: {found} instead of {wanted}")
    return [name for name in STALE_FILES if (base_folder / name).exists()]


def _differences(wanted: Tokenizer, found: Tokenizer) -> Iterator[tuple[str, str, str]]:
    left, right = json.loads(wanted.to_str()), json.loads(found.to_str())
    for part in ("model", "pre_tokenizer", "normalizer", "post_processor", "decoder"):
        if left[part] != right[part]:
            yield part, json.dumps(left[part])[:200], json.dumps(right[part])[:200]
    ids = [{a["content"]: a["id"] for a in spec["added_tokens"]} for spec in (left, right)]
    if ids[0] != ids[1]:
        yield "list of added tokens", str(ids[0])[:200], str(ids[1])[:200]


def _check_tokens(base: BaseTokenizer, tokens: Sequence[NewToken]) -> None:
    keys: dict[str, NewToken] = {}
    runs: dict[tuple[int, ...], NewToken] = {}
    for token in tokens:
        try:
            real = base.new_token(token.token)
        except TokenizerError as error:
            raise TokenizerError(f"{error}; these tokens were made for another tokenizer") from None
        if (real.key, real.run) != (token.key, token.run):
            raise TokenizerError(f"{token.token!r} stands for {list(real.run)} here, not for {list(token.run)}; "
                                 "these tokens were made for another tokenizer")
        if token.key in keys or token.run in runs:
            other = keys.get(token.key) or runs[token.run]
            raise TokenizerError(f"{token.token!r} and {other.token!r} have the same base ids; keep one of them")
        keys[token.key], runs[token.run] = token, token


def _classify(spec: dict[str, Any]) -> str:
    model = spec["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"this is a {model['type']} tokenizer; supported are {SUPPORTED}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise TokenizerError(f"this BPE tokenizer uses {option}={model[option]!r}; supported are {SUPPORTED}")
    steps = list(_steps(spec["pre_tokenizer"], "pretokenizers"))
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        if kinds[-1] != "ByteLevel" or any(s.get("add_prefix_space") for s in steps):
            raise TokenizerError(f"this byte-level tokenizer splits by {kinds}, with a space put in front of the text; "
                                 f"supported are {SUPPORTED}")
        expression = [step for step in steps if step["type"] != "ByteLevel" or step["use_regex"]]
        whole = len(expression) == 1 and (expression[0]["type"] == "ByteLevel" or _keeps_matches(expression[0]))
        if not expression:
            raise TokenizerError(f"this byte-level tokenizer does not split the text; supported are {SUPPORTED}")
        return CHUNKS if whole and _finds_its_way(expression[0]) else CHUNKS_WORDS_ONLY
    marks = any(SPACE_MARK in json.dumps(spec[part], ensure_ascii=False) for part in ("normalizer", "pre_tokenizer"))
    if marks and all(_never_cuts(step) for step in steps):
        return WHOLE_TEXT
    raise TokenizerError(f"this BPE tokenizer splits by {kinds or 'nothing'}; supported are {SUPPORTED}")


def _steps(node: dict[str, Any] | None, children: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a pre-tokenizer or normalizer, sequences taken apart."""
    if node is None:
        return
    if node["type"] == "Sequence":
        for child in node[children]:
            yield from _steps(child, children)
    else:
        yield node


def _keeps_matches(step: dict[str, Any]) -> bool:
    """Tell whether a Split step turns every match of its expression into a chunk."""
    return step["type"] == "Split" and "Regex" in step["pattern"] and (
        (step["behavior"] == "Isolated" and not step["invert"]) or (step["behavior"] == "Removed" and step["invert"]))


def _finds_its_way(step: dict[str, Any]) -> bool:
    """Tell whether the chunks of a Split step follow each other without gaps, and never look back.

    A phrase is matched where a chunk begins. In a gap between two matches it would begin anywhere, and an
    expression that looks back might not begin there after other text.
    """
    if step["type"] != "Split":
        return True  # the one that is built in
    expression = step["pattern"]["Regex"]
    if re.search(r"\(\?<[=!]|\\[bBAGK]|(^|[|(:])\^", expression):
        return False
    gaps = pre_tokenizers.Split(Regex(expression), "removed").pre_tokenize_str(GAP_PROBE)
    return not gaps


def _never_cuts(step: dict[str, Any]) -> bool:
    """Tell whether a step leaves text whole once its spaces are marks."""
    if step["type"] == "Metaspace":
        return not step.get("split", True)
    return step["type"] == "Split" and step["pattern"] == {"String": " "}


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _in_word(character: str) -> bool:
    return character.isalnum()


def _extended_steps(base: BaseTokenizer, tokens: Sequence[NewToken]) -> dict[str, Any] | None:
    steps = list(_steps(base.spec["pre_tokenizer"], "pretokenizers"))
    if base.kind == WHOLE_TEXT:
        steps += [_split(_whole_text_expression(base, tokens))] if tokens else []
        steps += [_split(_protection(base.unreachable))] if base.unreachable else []
        return {"type": "Sequence", "pretokenizers": steps}
    assert not base.unreachable, "looking at it raises an error where there is one"
    phrases = [t.token for t in tokens if len(base.backend.pre_tokenizer.pre_tokenize_str(t.token)) > 1]
    if not phrases:
        unchanged: dict[str, Any] = base.spec["pre_tokenizer"]
        return unchanged
    tree = prefix_tree({text: phrase_guard(text) for text in phrases})
    at = next(i for i, s in enumerate(steps) if s["type"] == "Split" or s["use_regex"])
    expression = steps[at]["pattern"]["Regex"] if steps[at]["type"] == "Split" else BYTE_LEVEL_SPLIT
    split = _split(f"{tree}|{expression}")
    split.update({k: steps[at][k] for k in ("behavior", "invert") if k in steps[at]})
    byte_level = {**steps[-1], "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps[:at], split, *steps[at + 1 : -1], byte_level]}


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _whole_text_expression(base: BaseTokenizer, tokens: Sequence[NewToken]) -> str:
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in base.spec["model"]["merges"]]
    ends, starts = whole_text_guards([t.key for t in tokens], MergeTable(merges, base.vocabulary),
                                     drops_unknown=base.drops_unknown)
    trees = []
    for first, guard in starts.items():
        trees.append(guard + prefix_tree({key: end for key, end in ends.items() if key[0] == first}))
    return "|".join(trees)


def _protection(cuts: Mapping[str, int]) -> str:
    """Return an expression that cuts a chunk in two if, and only if, it spells an unreachable entry."""
    guards: dict[str, set[str]] = {}
    for token, cut in cuts.items():
        guards.setdefault(token[:cut], set()).add(token[cut:])
    heads = {first: rf"(?={prefix_tree(dict.fromkeys(rests, ''))}\z)" for first, rests in guards.items()}
    return r"\A" + prefix_tree(heads)
