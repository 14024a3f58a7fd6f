"""Collect snippets: short windows of text in which a new token really occurs.

What is an occurrence is decided by the expanded tokenizer alone; a search for the base ids would find
`" ureter"` inside `" ureteral"`. Snippets are windows of expanded ids, so that `unmerge` gives the
teacher's view of the same text and the aligned positions for free. One pass over the corpus keeps a
uniform sample per token (reservoir sampling, Vitter 1985), not the first few: the first documents of
a corpus tend to be alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from vocabext.config import CollectConfig
from vocabext.expansion import Expansion
from vocabext.progress import Progress, no_progress
from vocabext.records import Document, NewToken, TokenSnippets
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend

BATCH = 256
# Base ids in front of the token: enough to be in context, few enough to leave room behind it, where
# the objective looks.
MAX_BEFORE = 0.4


@dataclass
class _Reservoir:
    """A uniform sample of the occurrences of one token."""

    seen: int = 0
    snippets: list[tuple[tuple[int, ...], int]] = field(default_factory=list)


def collect(
    documents: Iterable[Document],
    base: BaseTokenizer,
    tokens: Sequence[NewToken],
    config: CollectConfig,
    progress: Progress = no_progress,
) -> list[TokenSnippets]:
    """Sample snippets for every new token in one pass over the corpus.

    Args:
        documents: The corpus.
        base: The tokenizer of the base model.
        tokens: The new tokens, in token-id order.
        config: How many snippets, and how long.
        progress: Where to report.

    Returns:
        One record per token, in the same order; some may hold few snippets or none.
    """
    expanded = extend(base, tokens)
    reservoirs = {expanded.first_new_id + i: _Reservoir() for i in range(len(tokens))}
    rng = np.random.default_rng(config.seed)
    with progress("collecting snippets", None, "documents") as task:
        for batch in _batches(documents):
            for ids in expanded.encode_batch([document.text for document in batch]):
                _sample(np.asarray(ids, np.int64), expanded.expansion, reservoirs, config, rng)
            task.advance(len(batch))
    return [_record(token, reservoir) for token, reservoir in zip(tokens, reservoirs.values(), strict=True)]


def add_generated(
    records: Sequence[TokenSnippets], texts: dict[int, list[str]], expanded: ExpandedTokenizer, config: CollectConfig
) -> list[TokenSnippets]:
    """Top up tokens that are short of snippets with text that the model wrote.

    Args:
        records: What `collect` found.
        texts: Index of a token to texts written for it; only real occurrences in them count.
        expanded: The tokenizer with the new tokens.
        config: As for `collect`.
    """
    topped_up = list(records)
    for index, written in texts.items():
        reservoirs = {expanded.first_new_id + index: _Reservoir()}
        rng = np.random.default_rng([config.seed, index])
        for ids in expanded.encode_batch(written):
            _sample(np.asarray(ids, np.int64), expanded.expansion, reservoirs, config, rng)
        (found,) = reservoirs.values()
        record = records[index]
        new = found.snippets[: config.snippets - len(record.snippets)]
        topped_up[index] = replace(
            record,
            snippets=(*record.snippets, *(ids for ids, _ in new)),
            positions=(*record.positions, *(position for _, position in new)),
            num_generated=len(new),
        )
    return topped_up


def short_of_snippets(records: Sequence[TokenSnippets], config: CollectConfig) -> list[int]:
    """Return the indices of tokens with fewer snippets than `config.min_snippets`."""
    return [i for i, record in enumerate(records) if len(record.snippets) < config.min_snippets]


def _batches(documents: Iterable[Document]) -> Iterable[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _sample(
    ids: npt.NDArray[np.int64],
    expansion: Expansion,
    reservoirs: Mapping[int, _Reservoir],
    config: CollectConfig,
    rng: np.random.Generator,
) -> None:
    """Offer every occurrence in one document to the reservoir of its token id, if there is one (algorithm R)."""
    at = np.flatnonzero(expansion.is_new(ids))
    if not len(at):
        return
    ends = np.cumsum(expansion.run_lengths(ids))
    draws, befores = rng.random(len(at)), rng.random(len(at))
    for position, draw, before in zip(at.tolist(), draws.tolist(), befores.tolist(), strict=True):
        reservoir = reservoirs.get(int(ids[position]))
        if reservoir is None:
            continue
        reservoir.seen += 1
        if len(reservoir.snippets) < config.snippets:
            reservoir.snippets.append(_window(ids, ends, position, before, config.window))
        elif (place := int(draw * reservoir.seen)) < config.snippets:
            reservoir.snippets[place] = _window(ids, ends, position, before, config.window)


def _window(
    ids: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], position: int, before: float, window: int
) -> tuple[tuple[int, ...], int]:
    """Cut a window of about `window` base ids around a position; returns expanded ids and the place inside."""
    begin_of_token = int(ends[position - 1]) if position else 0
    start_base = max(0, begin_of_token - int(before * MAX_BEFORE * window))
    start = int(np.searchsorted(ends, start_base, side="right"))
    base_start = int(ends[start - 1]) if start else 0
    stop = max(int(np.searchsorted(ends, base_start + window, side="right")), position + 1)
    return tuple(ids[start:stop].tolist()), position - start


def _record(token: NewToken, reservoir: _Reservoir) -> TokenSnippets:
    # The same window twice is one piece of evidence; templated text has many.
    unique = list(dict.fromkeys(reservoir.snippets))
    return TokenSnippets(token, tuple(ids for ids, _ in unique), tuple(at for _, at in unique), reservoir.seen)
