"""Mine a corpus for the words and phrases that save most tokens.

The corpus is encoded by the base tokenizer and seen as a row of *units* (words, runs of punctuation):
a new token may begin and end only where a unit does. Candidates are all runs of up to `max_units`
units that are frequent. They are chosen greedily by what they save *given what is chosen already*:
once `" signs and symptoms"` is a token, `" symptoms"` saves only where it stands alone. Since choices
only ever lower what others save, a stale value is an upper bound and most of them need never be
computed again (lazy greedy, Minoux 1978).

What a candidate saves in the one *section* (a document, or a part of a long one) that uses it most does
not count: a name that fills one document says little about the next. Held-out text gets shorter by it, though
the mining corpus gets longer (measured in docs/decisions.md).
"""

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vocabext.checkpoint import resolve_model
from vocabext.config import MineConfig
from vocabext.errors import CorpusError, TokenizerError, UsageError
from vocabext.manifest import file_sha256
from vocabext.progress import Progress, no_progress
from vocabext.records import Document, NewToken, read_jsonl, write_jsonl
from vocabext.tokenizer import BaseTokenizer, extend

Array = npt.NDArray[np.int64]
BATCH = 512
# `auto` looks for the knee among this many tokens.
MAX_AUTO_BUDGET = 10_000
# Long documents are cut into sections, none of which holds more than one part in so many of the corpus.
MIN_SECTIONS = 20
# How many rejected candidates are named in the artifact for each reason; all are counted.
MAX_EXAMPLES = 10


@dataclass(frozen=True)
class CurvePoint:
    """How much shorter the mining corpus gets with the first `budget` tokens."""

    budget: int
    saved_tokens: int
    shorter_share: float


@dataclass(frozen=True)
class MineResult:
    """What was mined.

    Attributes:
        tokens: The chosen tokens, best first by what they save outside the section that uses them most;
            counts are those of the expanded tokenizer.
        curve: Savings by budget, as the greedy choice accounts for them.
        base_tokens: Length of the corpus in base tokens.
        expanded_tokens: The same under the expanded tokenizer, measured.
        documents: How many documents were read.
        candidates: How many frequent runs there were to choose from.
        rejected: Candidates that would have been chosen but cannot be tokens: text to reason.
    """

    tokens: tuple[NewToken, ...]
    curve: tuple[CurvePoint, ...]
    base_tokens: int
    expanded_tokens: int
    documents: int
    candidates: int
    rejected: dict[str, str]

    @property
    def shorter_share(self) -> float:
        """By which share the expanded tokenizer makes the mining corpus shorter, measured."""
        return 1 - self.expanded_tokens / self.base_tokens

    def rejected_by_reason(self) -> dict[str, int]:
        """Count the rejected candidates by reason, the commonest first."""
        return dict(Counter(map(_reason, self.rejected.values())).most_common())

    def rejected_examples(self) -> dict[str, str]:
        """Return some rejected candidates of each reason, with the reason in full."""
        seen: Counter[str] = Counter()
        examples = {}
        for text, why in self.rejected.items():
            seen[_reason(why)] += 1
            if seen[_reason(why)] <= MAX_EXAMPLES:
                examples[text] = why
        return examples


def mine(
    documents: Iterable[Document], base: BaseTokenizer, config: MineConfig, progress: Progress = no_progress, *,
    at_most: bool = False,
) -> MineResult:  # fmt: skip
    """Choose the new tokens for a corpus.

    Args:
        documents: The domain corpus.
        base: The tokenizer to extend.
        config: Budget and thresholds.
        progress: Where to report.
        at_most: Take what there is where the corpus yields fewer tokens than the budget asks for.

    Raises:
        UsageError: If the corpus yields fewer tokens than the budget asks for, or none.
        CorpusError: If there is no document.
    """
    texts = [document.text for document in documents]
    if not texts:
        raise CorpusError("there is no document to mine; give more text")
    corpus = _read(texts, base, progress)
    candidates = _count(corpus, config)
    if not len(candidates):
        raise UsageError(f"no run of at least two tokens occurs {config.min_count} times in this corpus; "
                         "give more text, or lower --min-count")
    target = min(config.budget or MAX_AUTO_BUDGET, len(candidates))
    kept, rejected = _choose_and_check(texts, corpus, candidates, base, config, target, progress)
    tokens, expanded_tokens, rare = _settle(texts, base, kept, config, progress)
    if config.budget is not None and len(tokens) < config.budget and not (at_most and tokens):
        raise UsageError(f"--budget is {config.budget}, but only {len(tokens)} tokens that occur at least "
                         f"{config.min_count} times can be made; lower --budget to {len(tokens)}, lower --min-count, "
                         "or give more text")
    if not tokens:
        raise UsageError(f"none of the {len(candidates)} frequent runs of this corpus can be a token that occurs "
                         f"{config.min_count} times; give more text, or lower --min-count")
    rejected |= rare
    curve = _curve([token.saved for token in tokens], corpus.num_tokens)
    return MineResult(tuple(tokens), curve, corpus.num_tokens, expanded_tokens, len(texts), len(candidates), rejected)


def write_candidates(
    path: Path, result: MineResult, base: BaseTokenizer, *, model: str, config: MineConfig, corpus: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    """Write what was mined: a header, then one line per token in token-id order.

    Args:
        path: The file; replaced if it is there.
        result: What `mine` returned.
        base: The tokenizer that it was mined with.
        model: Its folder or hub id, as it was given.
        config: The options of `mine`.
        corpus: The sources of the corpus, as they were given.

    Returns:
        The header.
    """
    header = {
        "base": {"model": model, "num_used_ids": base.num_used_ids,
                 "tokenizer_sha256": file_sha256(resolve_model(model) / "tokenizer.json")},
        "options": asdict(config), "corpus": list(corpus), "documents": result.documents,
        "base_tokens": result.base_tokens, "expanded_tokens": result.expanded_tokens,
        "candidates": result.candidates,
        "rejected": {"count": len(result.rejected), "by_reason": result.rejected_by_reason(),
                     "examples": result.rejected_examples()},
        "curve": [asdict(point) for point in result.curve],
    }  # fmt: skip
    write_jsonl(path, "candidates", header, (token.to_json() for token in result.tokens))
    return header


def read_candidates(path: Path) -> tuple[dict[str, Any], list[NewToken]]:
    """Read the artifact of `mine` back.

    Returns:
        The header, and the tokens in token-id order.

    Raises:
        UsageError: If the file is missing, damaged or another artifact.
    """
    header, rows = read_jsonl(path, ("candidates",))
    try:
        tokens = [NewToken.from_json(row) for row in rows]
        str(header["base"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {error}); mine again") from None
    if not tokens:
        raise UsageError(f"{path} holds no tokens; mine again")
    return header, tokens


def _reason(why: str) -> str:
    """Take the texts out of a reason, so that equal reasons can be counted."""
    quoted = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
    return re.sub(quoted, "...", re.sub(rf"^(?:{quoted}) ", "it ", why))


@dataclass
class _Corpus:
    """The corpus as units. Arrays of shape (U,): one entry per unit; documents are set apart by a barrier."""

    ids: Array  # all token ids, flat (T,)
    starts: Array  # index into `ids` of each unit's first token
    pieces: Array  # tokens per unit
    codes: npt.NDArray[np.uint64]  # hash of each unit's ids
    inside: npt.NDArray[np.bool_]  # may stand in a token at all
    closable: npt.NDArray[np.bool_]  # a phrase may end with this unit, given the unit that follows it
    sections: Array  # the section that each unit belongs to, counted upwards

    @property
    def num_tokens(self) -> int:
        return int((self.ids >= 0).sum())

    def run(self, unit: int, units: int) -> tuple[int, ...]:
        first, last = unit, unit + units - 1
        return tuple(int(i) for i in self.ids[self.starts[first] : self.starts[last] + self.pieces[last]])


def _read(texts: Sequence[str], base: BaseTokenizer, progress: Progress) -> _Corpus:
    ids: list[Array] = []
    starts: list[npt.NDArray[np.bool_]] = []
    barrier, edge = np.full(1, -1, np.int64), np.ones(1, np.bool_)
    with progress("reading the corpus", len(texts), "documents") as task:
        for at in range(0, len(texts), BATCH):
            for units in base.encode_units(texts[at : at + BATCH]):
                ids += [units.ids, barrier]
                starts += [units.starts, edge]
                task.advance()
    flat, first = np.concatenate(ids), np.flatnonzero(np.concatenate(starts))
    pieces = np.diff(np.append(first, len(flat)))
    inside = _allowed(flat, first, base)
    following = np.append(flat[first[1:]], -1)
    closable = base.phrase_may_end(flat[first + pieces - 1], following)
    return _Corpus(flat, first, pieces, _unit_codes(flat, first, pieces), inside, closable, _sections(flat[first]))


def _sections(first_ids: Array) -> Array:
    """Number the sections of a corpus, given the first id of each unit."""
    begins = np.append(True, first_ids[:-1] < 0)
    begins[:: -(-len(first_ids) // MIN_SECTIONS)] = True
    return np.cumsum(begins)


def _allowed(ids: Array, starts: Array, base: BaseTokenizer) -> npt.NDArray[np.bool_]:
    """Tell for each unit whether it may be (part of) a token."""
    broken = np.zeros(base.num_used_ids + 1, np.bool_)
    broken[base.barrier_ids] = True
    broken[-1] = True  # index -1: the barrier between documents
    return ~np.logical_or.reduceat(broken[ids], starts)


def _unit_codes(ids: Array, starts: Array, pieces: Array) -> npt.NDArray[np.uint64]:
    """Hash the ids of each unit; the place inside the unit counts, so that order does."""
    rng = np.random.default_rng(0)
    values = rng.integers(1, 2**63, int(ids.max()) + 2, np.uint64) | np.uint64(1)
    place = np.arange(len(ids)) - np.repeat(starts, pieces)
    factors = np.cumprod(np.full(int(pieces.max()), np.uint64(0x9E3779B97F4A7C15)), dtype=np.uint64)
    return np.add.reduceat(values[ids] * factors[place], starts)


@dataclass
class _Candidates:
    """The frequent runs of units and where they occur; arrays of shape (C,) unless noted."""

    units: Array  # units per run
    worth: Array  # the tokens it would save if nothing else were chosen, overlaps not yet taken out
    positions: Array  # all places, candidate by candidate (P,)
    edges: Array  # where each candidate's places begin in `positions` (C + 1,)

    def __len__(self) -> int:
        return len(self.units)

    def places(self, index: int) -> Array:
        """Return the units at which a candidate begins, in reading order."""
        return self.positions[self.edges[index] : self.edges[index + 1]]


def _count(corpus: _Corpus, config: MineConfig) -> _Candidates:
    """Find all runs of units that are frequent enough and at least two tokens long."""
    none = np.empty(0, np.int64)
    found: list[tuple[Array, Array, Array, Array]] = [(none, none, none, none)]
    codes = corpus.codes.copy()
    alive = corpus.inside.copy()
    pieces = corpus.pieces.copy()
    for units in range(1, 2 if config.words_only else config.max_units + 1):
        if units > 1:
            alive, codes, pieces = _longer(corpus, alive, codes, pieces, units)
        at = np.flatnonzero(alive)
        if not len(at):
            break
        _, group, counts = np.unique(codes[at], return_inverse=True, return_counts=True)
        frequent = counts[group] >= config.min_count
        alive[at[~frequent]] = False  # a longer run cannot be more frequent than its beginning
        at, group = at[frequent], group[frequent]
        usable = (pieces[at] > 1) & (corpus.closable[at + units - 1] | (units == 1))
        found.append(_grouped(at[usable], group[usable], pieces, units, config.min_count))
    lengths, worth, positions, sizes = (np.concatenate(column) for column in zip(*found, strict=True))
    return _Candidates(lengths, worth, positions, np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes))))


def _grouped(at: Array, group: Array, pieces: Array, units: int,
             min_count: int) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Sort places by the run that stands there; returns units, worth, all places, and how many for each run."""
    counts = np.bincount(group)
    enough = counts[group] >= min_count
    at, group = at[enough], group[enough]
    at = at[np.argsort(group, kind="stable")]
    sizes = counts[counts >= min_count]
    first = at[np.cumsum(sizes) - sizes]
    return np.full(len(sizes), units), sizes * (pieces[first] - 1), at, sizes


def _longer(corpus: _Corpus, alive: npt.NDArray[np.bool_], codes: npt.NDArray[np.uint64], pieces: Array,
            units: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64], Array]:  # fmt: skip
    """Extend every run that is still alive by the unit that follows it."""
    wider = np.zeros_like(alive)
    follows = slice(units - 1, None)
    width = len(alive) - units + 1
    wider[:width] = alive[:width] & corpus.inside[follows]
    longer = codes.copy()
    longer[:width] = codes[:width] * np.uint64(0xD6E8FEB86659FD93) + corpus.codes[follows]
    total = pieces.copy()
    total[:width] += corpus.pieces[follows]
    return wider, longer, total


def _choose_and_check(
    texts: Sequence[str], corpus: _Corpus, candidates: _Candidates, base: BaseTokenizer, config: MineConfig,
    budget: int, progress: Progress,
) -> tuple[list[NewToken], dict[str, str]]:  # fmt: skip
    """Choose tokens, and drop those that the real tokenizer produces too rarely; choose more if too few are left."""
    extra = 8 + budget // 20
    while True:
        chosen, rejected = _choose(corpus, candidates, base, config, budget + extra, progress)
        counted, _ = _measure(texts, base, chosen, progress)
        kept = [token for token in counted if token.count >= config.min_count]
        if len(kept) >= budget or len(chosen) < budget + extra:
            return kept, {**rejected, **_rare(counted, config)}
        extra = 2 * extra + 2 * (budget - len(kept))


def _settle(
    texts: Sequence[str], base: BaseTokenizer, kept: Sequence[NewToken], config: MineConfig, progress: Progress
) -> tuple[list[NewToken], int, dict[str, str]]:
    """Cut the tokens to the budget, and go on dropping rare ones: without some tokens, others may be produced less.

    Returns:
        The tokens with their counts; how many tokens the corpus has with them; those dropped, with the reason.
    """
    rejected: dict[str, str] = {}
    limit = config.budget or _knee([token.saved for token in kept])
    while kept:
        tokens, total = _measure(texts, base, kept[:limit], progress)
        rare = _rare(tokens, config)
        if not rare:
            return tokens, total, rejected
        rejected |= rare
        kept = [token for token in kept if token.token not in rare]
    return [], 0, rejected


def _rare(counted: Sequence[NewToken], config: MineConfig) -> dict[str, str]:
    why = f"the expanded tokenizer produces it fewer than {config.min_count} times"
    return {token.token: why for token in counted if token.count < config.min_count}


def _choose(
    corpus: _Corpus, candidates: _Candidates, base: BaseTokenizer, config: MineConfig, wanted: int,
    progress: Progress,
) -> tuple[list[NewToken], dict[str, str]]:  # fmt: skip
    """Take the candidate that saves most elsewhere, again and again, recomputing only what may have changed."""
    cover = _Cover(corpus, candidates)
    chosen: list[NewToken] = []
    rejected: dict[str, str] = {}
    taken: set[tuple[int, ...]] = set()
    heap = [(-worth, index, -1) for index, worth in enumerate(candidates.worth.tolist())]
    heapq.heapify(heap)
    with progress("choosing tokens", wanted, "tokens") as task:
        while heap and len(chosen) < wanted:
            _, index, computed_at = heapq.heappop(heap)
            if computed_at < len(chosen):
                elsewhere, count = cover.savings(index)
                if count >= config.min_count and elsewhere > 0:
                    heapq.heappush(heap, (-elsewhere, index, len(chosen)))
                continue
            # Only a winner is made a token: that takes longer than all the rest.
            run = corpus.run(int(candidates.places(index)[0]), int(candidates.units[index]))
            if run in taken:
                continue
            try:
                token = _as_token(run, base, config)
            except TokenizerError as error:
                rejected[_text(run, base)] = str(error)
                continue
            taken.add(run)
            chosen.append(replace(token, saved=cover.take(index)))
            task.advance()
        if len(chosen) < wanted:
            task.note("no other candidate saves anything")
    return chosen, rejected


def _text(run: Sequence[int], base: BaseTokenizer) -> str:
    return base.key_text(base.scheme.spelling(run).decode(errors="replace"))


def _as_token(run: tuple[int, ...], base: BaseTokenizer, config: MineConfig) -> NewToken:
    text = _text(run, base)
    if len(text) > config.max_characters:
        raise TokenizerError(f"{text!r} is longer than {config.max_characters} characters")
    token = base.new_token(text)
    if token.run != run:
        raise TokenizerError(f"{text!r} is cut differently on its own")
    return token


class _Cover:
    """Which units are covered by chosen tokens, and what a candidate would still save."""

    def __init__(self, corpus: _Corpus, candidates: _Candidates) -> None:
        self.candidates = candidates
        self.sections = corpus.sections
        self.cost = corpus.pieces.copy()  # tokens counted at each unit's first place
        self.begins = np.ones(len(corpus.pieces) + 1, np.bool_)  # a token or free unit begins here
        self.left: dict[int, Array] = {}  # where a candidate still fits, once some of its places are gone

    def savings(self, index: int) -> tuple[int, int]:
        """Return the tokens that a candidate would save now outside its best section, and at how many places in all."""
        at, cost = self._free(index)
        if not len(at):
            return 0, 0
        sections = self.sections[at]
        edges = np.flatnonzero(np.append(True, sections[1:] != sections[:-1]))
        saved = np.add.reduceat(cost - 1, edges)
        return int(saved.sum() - saved.max()), len(at)

    def take(self, index: int) -> int:
        """Cover a candidate's places; returns the tokens saved."""
        at, cost = self._free(index)
        for offset in range(int(self.candidates.units[index])):
            self.cost[at + offset] = 1 if offset == 0 else 0
            self.begins[at + offset] = offset == 0
        return int(cost.sum()) - len(at)

    def _free(self, index: int) -> tuple[Array, Array]:
        """Return the places where a candidate still saves something, and what the text costs there now."""
        units = int(self.candidates.units[index])
        at = self.left[index] if index in self.left else self.candidates.places(index)
        fits = self.begins[at] & self.begins[at + units]
        if not fits.all():
            # Places that an earlier token cuts into are gone for good, and never looked at again.
            at = self.left[index] = at[fits]
        cost = self.cost[at]
        for offset in range(1, units):
            cost = cost + self.cost[at + offset]
        saves = cost > 1
        if not saves.all():
            at, cost = at[saves], cost[saves]
        if units > 1:
            apart = _apart(at, units)
            at, cost = at[apart], cost[apart]
        return at, cost


def _apart(at: Array, units: int) -> slice | npt.NDArray[np.bool_]:
    """Select the places that do not begin inside the one before (`"ha ha ha"`), from left to right."""
    if len(at) < 2 or int((at[1:] - at[:-1]).min()) >= units:
        return slice(None)
    keep, end = np.zeros(len(at), np.bool_), -1
    for index, position in enumerate(at.tolist()):
        if position >= end:
            keep[index] = True
            end = position + units
    return keep


def _measure(
    texts: Sequence[str], base: BaseTokenizer, tokens: Sequence[NewToken], progress: Progress
) -> tuple[list[NewToken], int]:
    """Count what the real expanded tokenizer does on the corpus."""
    expanded = extend(base, tokens)
    counts = np.zeros(len(tokens), np.int64)
    total = 0
    with progress("checking on the real tokenizer", len(texts), "documents") as task:
        for at in range(0, len(texts), BATCH):
            rows = expanded.encode_batch(texts[at : at + BATCH])
            ids = np.fromiter((i for row in rows for i in row), np.int64)
            total += len(ids)
            counts += np.bincount(ids[expanded.expansion.is_new(ids)] - base.num_used_ids, minlength=len(tokens))
            task.advance(len(rows))
    return [replace(token, count=int(count)) for token, count in zip(tokens, counts, strict=True)], total


def _curve(saved: Sequence[int], total: int) -> tuple[CurvePoint, ...]:
    sums = np.cumsum(np.asarray(saved, np.int64))
    steps = [n for k in range(1, 7) for n in (10**k, 25 * 10 ** (k - 1), 5 * 10**k) if n < len(sums)]
    return tuple(CurvePoint(n, int(sums[n - 1]), float(sums[n - 1]) / total) for n in sorted({*steps, len(sums)}))


def _knee(saved: Sequence[int]) -> int:
    """Return the budget at which the curve of savings is furthest above its own chord."""
    curve = np.cumsum(np.asarray(saved, np.float64))
    if len(curve) < 3:
        return len(curve)
    x = np.arange(1, len(curve) + 1) / len(curve)
    return int(np.argmax(curve / curve[-1] - x)) + 1
