"""Mine a corpus for the words and phrases that save most tokens.

The corpus is encoded by the base tokenizer and seen as a row of *units* (words, strings of punctuation). Tokens are
chosen greedily, each by what it saves *given what is chosen already*: sequences of units where the tokenizer looks
whole strings up (`vocabext.mine.sequences`), pairs of tokens where new tokens are merges (`vocabext.mine.merges`).

What the corpus says again, such as a template that thousands of documents share, is counted once
(`vocabext.mine.repeats`). What a candidate saves in the one *section* (a document, or a part of a long one) that uses
it most does not count: a name that fills one document says little about the next. Held-out text gets shorter by it,
though the mining corpus gets longer (measured in docs/decisions/mining.md).

Merges have a price: a long token needs its *parts* among the tokens, also one that is hardly ever left over.
"""

import heapq
import re
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from vocabext.checkpoint.folder import resolve_model
from vocabext.corpus import Document
from vocabext.errors import CorpusError, UsageError
from vocabext.files.jsonl import read_tokens, write_jsonl
from vocabext.files.ranges import file_sha256
from vocabext.mine.counts import Choice, Corpus, Flags, read_corpus, text_of
from vocabext.mine.merges import choose_merges
from vocabext.mine.repeats import NO_REPEATS, Repeats
from vocabext.mine.sequences import choose_sequences, frequent_sequences
from vocabext.mine.usage import Usage
from vocabext.options import MineConfig
from vocabext.progress import Progress, no_progress
from vocabext.tokenizer import BaseTokenizer
from vocabext.tokens import NewToken

# `auto` looks for the knee among this many tokens.
MAX_AUTO_BUDGET = 10_000
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
        candidates: How many frequent sequences, or pairs, there were to choose from.
        rejected: Candidates that would have been chosen but cannot be tokens: text to reason.
        parts: How many tokens are too rare by themselves, and needed because longer ones are merged from them.
        searched: How many tokens no merge can make, so that text is searched for them.
        repeats: What was counted once.
    """

    tokens: tuple[NewToken, ...]
    curve: tuple[CurvePoint, ...]
    base_tokens: int
    expanded_tokens: int
    documents: int
    candidates: int
    rejected: dict[str, str]
    parts: int = 0
    searched: int = 0
    repeats: Repeats = NO_REPEATS

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
) -> MineResult:
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
    corpus = read_corpus(texts, base, progress, dedup=config.dedup)
    choice = _choose(corpus, base, config)
    usage = Usage(texts, corpus.encoded, base, progress)
    tokens, rare = _settle(choice, usage, base, config, progress)
    candidates, repeats = choice.candidates(), corpus.encoded.repeats
    once = f" ({repeats.describe()} were counted once; --no-dedup counts them all)" if repeats.any else ""
    if not candidates:
        raise UsageError(f"no run of at least two tokens occurs {config.min_count} times in this corpus; "
                         f"give more text, or lower --min-count{once}")
    if not tokens:
        raise UsageError(f"none of the {candidates} frequent sequences of this corpus can be a token that occurs "
                         f"{config.min_count} times; give more text, or lower --min-count{once}")
    if config.budget is not None and len(tokens) < config.budget and not at_most:
        raise UsageError(f"--budget is {config.budget}, but only {len(tokens)} tokens that occur at least "
                         f"{config.min_count} times can be made; lower --budget to {len(tokens)}, lower --min-count, "
                         f"or give more text{once}")
    curve = _curve([token.saved for token in tokens], corpus.num_tokens)
    return MineResult(tuple(tokens), curve, corpus.num_tokens, usage.num_tokens, len(texts), candidates,
                      {**choice.rejected, **rare}, parts=sum(token.count < config.min_count for token in tokens),
                      searched=len(base.scheme.searched(tokens)), repeats=repeats)


def candidates_header(
    result: MineResult, base: BaseTokenizer, *, model: str, config: MineConfig, corpus: Sequence[str],
    left_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the header of the artifact: what was mined from what, and what it saves.

    Args:
        result: What `mine` returned.
        base: The tokenizer that it was mined with.
        model: Its folder or hub id, as it was given.
        config: The options of `mine`.
        corpus: The sources of the corpus, as they were given.
        left_out: What of them was not read.
    """
    return {
        "base": {"model": model, "num_used_ids": base.first_new_id,
                 "tokenizer_sha256": file_sha256(resolve_model(model) / "tokenizer.json")},
        "options": asdict(config), "corpus": list(corpus),
        "left_out": dict(left_out or {}), "documents": result.documents,
        "base_tokens": result.base_tokens, "expanded_tokens": result.expanded_tokens,
        "candidates": result.candidates, "parts": result.parts,
        "searched": result.searched, "counted_once": asdict(result.repeats),
        "rejected": {"count": len(result.rejected), "by_reason": result.rejected_by_reason(),
                     "examples": result.rejected_examples()},
        "curve": [asdict(point) for point in result.curve],
    }


def write_candidates(
    path: Path, result: MineResult, base: BaseTokenizer, *, model: str, config: MineConfig, corpus: Sequence[str],
    left_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write what was mined: a header, then one line per token in token-id order.

    Args:
        path: The file; replaced if it is there.
        result: What `mine` returned.
        base: As for `candidates_header`.
        model: As for `candidates_header`.
        config: As for `candidates_header`.
        corpus: As for `candidates_header`.
        left_out: As for `candidates_header`.

    Returns:
        The header.
    """
    header = candidates_header(result, base, model=model, config=config, corpus=corpus, left_out=left_out)
    save_candidates(path, result.tokens, header)
    return header


def save_candidates(path: Path, tokens: Iterable[NewToken], header: dict[str, Any]) -> None:
    """Write tokens and their header, atomically."""
    write_jsonl(path, "candidates", header, (token.to_json() for token in tokens))


def read_candidates(path: Path) -> tuple[dict[str, Any], list[NewToken]]:
    """Read the artifact of `mine` back.

    Returns:
        The header, and the tokens in token-id order.

    Raises:
        UsageError: If the file is missing, damaged or another artifact.
    """
    return read_tokens(path, ("candidates",), NewToken.from_json)


def _reason(why: str) -> str:
    """Take the texts out of a reason, so that equal reasons can be counted."""
    quoted = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
    return re.sub(quoted, "...", re.sub(rf"^(?:{quoted}) ", "it ", why))


def _choose(corpus: Corpus, base: BaseTokenizer, config: MineConfig) -> Choice:
    """Choose tokens: merges, sequences that are looked up, or the best of both."""
    found, merges = [], base.scheme.chain()
    if not base.scheme.only_merges:
        candidates = frequent_sequences(corpus, config, _merged_units(corpus, base))
        found.append(choose_sequences(corpus, candidates, base, config))
    if merges is not None and (base.scheme.only_merges or base.scheme.mergeable_ids[corpus.ids[corpus.ids >= 0]].any()):
        found.append(choose_merges(corpus, base, merges, config))
    # They hardly ever want the same text: merges are for letters without spaces, or for everything.
    tokens = heapq.merge(*(choice.tokens for choice in found), key=lambda chosen: -chosen[0])
    return Choice(tokens, ChainMap(*(choice.rejected for choice in found)),
                  lambda: sum(choice.candidates() for choice in found))


def _merged_units(corpus: Corpus, base: BaseTokenizer) -> Flags:
    """Tell which units are letters without spaces between words: their sequences are found as merges, shape (U,)."""
    merges, mergeable = base.scheme.chain(), np.append(base.scheme.mergeable_ids, False)
    merged = np.logical_and.reduceat(mergeable[corpus.ids], corpus.starts)
    if merges is None or not merged.any():
        return np.zeros(len(merged), np.bool_)
    at = np.flatnonzero(merged)
    _, first, number = np.unique(corpus.codes[at], return_index=True, return_inverse=True)
    texts = (text_of(corpus.run(int(at[i]), 1), base) for i in first)
    merged[at] = np.asarray([merges.accepts(NewToken(text, "", ())) for text in texts])[number]
    return merged


def _settle(
    choice: Choice, usage: Usage, base: BaseTokenizer, config: MineConfig, progress: Progress
) -> tuple[list[NewToken], dict[str, str]]:
    """Take the first tokens; as long as the real tokenizer produces some too rarely, put the next in their place.

    A few more than wanted are tried first, since some become rare once longer ones are there.

    Returns:
        The tokens with their counts; those dropped, with the reason.
    """
    more: Iterator[NewToken] = (token for _, token in choice.tokens)
    wanted = config.budget or MAX_AUTO_BUDGET
    kept: list[NewToken] = []
    with progress("choosing tokens", wanted, "tokens") as task:
        for token in islice(more, wanted + 8 + wanted // 20):
            kept.append(token)
            task.advance(len(kept) <= wanted)
        if len(kept) < wanted:
            task.note("no other candidate saves anything")
    rejected = _rare(usage.update(kept), base, config)
    kept = [token for token in kept if token.token not in rejected]
    wanted = config.budget or _knee([token.saved for token in kept])
    more = chain(kept[wanted:], more)
    kept = kept[:wanted]
    while kept:
        kept += islice(more, wanted - len(kept))
        tokens = usage.update(kept)
        rare = _rare(tokens, base, config)
        if not rare:
            return tokens, rejected
        rejected |= rare
        kept = [token for token in kept if token.token not in rare]
    return [], rejected


def _rare(counted: Sequence[NewToken], base: BaseTokenizer, config: MineConfig) -> dict[str, str]:
    """Return the tokens that are too rare to be kept, with the reason: neither they nor what is merged from them."""
    why = f"the expanded tokenizer produces it fewer than {config.min_count} times"
    parts, rare = base.scheme.parts(counted), {}
    needed: set[int] = set()
    # The longest first: a token has fewer base ids than what is merged from it.
    for i in sorted(range(len(counted)), key=lambda i: -len(counted[i].run)):
        if i in needed or counted[i].count >= config.min_count:
            needed.update(parts[i])
        else:
            rare[counted[i].token] = why
    return rare


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
