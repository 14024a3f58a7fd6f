"""Collect snippets: short windows of text in which a new token really occurs.

What is an occurrence is decided by the expanded tokenizer alone; a search for the base ids would find
`" ureter"` inside `" ureteral"`. Snippets are windows of expanded ids, so that `unmerge` gives the
teacher's view of the same text and the aligned positions for free. One pass over the corpus keeps a
uniform sample per token (reservoir sampling, Vitter 1985), not the first few: the first documents of
a corpus tend to be alike.

Some tokens are there because longer ones are merged from them, and hardly ever stand alone. What they mean can be
seen inside the longer ones as well: with such a token, and the rest of the longer one behind it, the text is the
same to the base. A token that is short of snippets gets some of these.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vocabext.corpus import Document
from vocabext.files.jsonl import read_tokens, write_jsonl
from vocabext.options import CollectConfig
from vocabext.progress import Progress, no_progress
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend
from vocabext.tokens import Expansion, Ids, NewToken, TokenSnippets

BATCH = 256
# Base ids in front of the token: enough to be in context, few enough to leave room behind it, where
# the objective looks.
MAX_BEFORE = 0.4
# Not each written text holds a real occurrence: what is still missing is tried once more.
WRITING_ROUNDS = 2
# Prompts that the model continues at once.
PROMPTS_PER_BATCH = 64
# Sampling as it is: the snippets should be what the model itself finds likely.
TEMPERATURE = 1.0
# What may stand in front of a written text; the first after which the token really occurs is taken.
LEADS = ("", "\n", " ", ". ", "(", "x")
# For a new id the ids to write in its place, and which of them is a token that is looked for.
_Splits = dict[int, list[tuple[tuple[int, ...], int]]]


class Writer(Protocol):
    """What continues prompts: `vocabext.model.frozen.FrozenModel`."""

    @property
    def max_positions(self) -> int:
        """The longest text in ids."""

    def write(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, temperature: float, seed: int,
              first_new_id: int) -> list[list[int]]:
        """Continue prompts of equal length; returns the new ids of each."""


@dataclass
class _Reservoir:
    """A uniform sample of the occurrences of one token."""

    seen: int = 0
    snippets: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    def place(self, size: int, draw: float) -> int | None:
        """Return where the next occurrence goes in a sample of some size, or None (algorithm R)."""
        self.seen += 1
        place = len(self.snippets) if len(self.snippets) < size else int(draw * self.seen)
        return place if place < size else None


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
    inside = {token_id: _Reservoir() for token_id in reservoirs}
    # Whoever occurred often when it was mined will find enough places of its own.
    rare = {token_id for token_id, token in zip(reservoirs, tokens, strict=True) if token.count < config.snippets}
    splits = _splits(expanded, base.scheme.merged_from(tokens), rare)
    rng, rng_inside = np.random.default_rng(config.seed), np.random.default_rng([config.seed, 1])
    with progress("collecting snippets", None, "documents") as task:
        for batch in _batches(documents):
            for row in expanded.encode_batch([document.text for document in batch]):
                ids = np.asarray(row, np.int64)
                _sample(ids, expanded.expansion, reservoirs, config, rng)
                if splits:
                    _sample_inside(ids, expanded.expansion, splits, inside, config, rng_inside)
            task.advance(len(batch))
    return [_topped_up(_record(token, reservoirs[token_id]), inside[token_id], config)
            for token_id, token in zip(reservoirs, tokens, strict=True)]


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
        known = set(record.snippets)
        distinct = [snippet for snippet in dict.fromkeys(found.snippets) if snippet[0] not in known]
        new = distinct[: max(0, config.snippets - len(record.snippets))]
        topped_up[index] = replace(
            record,
            snippets=(*record.snippets, *(ids for ids, _ in new)),
            positions=(*record.positions, *(position for _, position in new)),
            num_generated=record.num_generated + len(new),
        )
    return topped_up


def generate_missing(
    records: Sequence[TokenSnippets], model: Writer, base: BaseTokenizer, config: CollectConfig,
    progress: Progress = no_progress,
) -> list[TokenSnippets]:
    """Let the model write text for every token with fewer than `config.min_snippets` snippets.

    The model continues the token's base ids; only texts in which the expanded tokenizer really
    produces the token count, so a token may stay short of snippets.

    Args:
        records: What `collect` found.
        model: The frozen base model.
        base: Its tokenizer.
        config: As for `collect`.
        progress: Where to report.

    Returns:
        One record per token, in the same order.
    """
    expanded = extend(base, [record.new_token for record in records])
    short, topped_up = short_of_snippets(records, config), list(records)
    for writing_round in range(WRITING_ROUNDS):
        missing = {i: config.snippets - len(topped_up[i].snippets) for i in short}
        texts = _write(missing, model, base, expanded, config, writing_round, progress)
        topped_up = add_generated(topped_up, texts, expanded, config)
    return topped_up


def _write(
    missing: Mapping[int, int], model: Writer, base: BaseTokenizer, expanded: ExpandedTokenizer,
    config: CollectConfig, writing_round: int, progress: Progress,
) -> dict[int, list[str]]:
    """Let the model write one text for each missing snippet; returns them by the index of their token."""
    texts: dict[int, list[str]] = defaultdict(list)
    prompts: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)  # by length: one call needs equal ones
    for index, count in missing.items():
        prompt = [*base.prefix_ids, *expanded.tokens[index].run]
        if count and len(prompt) < model.max_positions:
            prompts[len(prompt)] += [(index, prompt)] * count
    if not prompts:
        return texts
    with progress("writing text", sum(len(group) for group in prompts.values()), "texts") as task:
        for length, group in sorted(prompts.items()):
            num_tokens = min(config.window, model.max_positions - length)
            for at in range(0, len(group), PROMPTS_PER_BATCH):
                batch = group[at : at + PROMPTS_PER_BATCH]
                seed = int(np.random.SeedSequence([config.seed, writing_round, length, at]).generate_state(1)[0])
                written = model.write([prompt for _, prompt in batch], num_tokens, temperature=TEMPERATURE,
                                      seed=seed, first_new_id=base.first_new_id)
                for (index, _), ids in zip(batch, written, strict=True):
                    texts[index].append(_written_text(index, ids, base, expanded))
                task.advance(len(batch))
    return texts


def _written_text(index: int, continuation: Sequence[int], base: BaseTokenizer, expanded: ExpandedTokenizer) -> str:
    """Spell what the model wrote, token included, such that the token occurs in it if that is possible."""
    added = set(base.added.values())
    end = next((i for i, token_id in enumerate(continuation) if token_id in added), len(continuation))
    token = expanded.tokens[index]
    # Decoders strip a space at the start of a text: the token's own spelling goes in front.
    rest = base.decode([*token.run, *continuation[:end]]).removeprefix(base.decode(token.run))
    texts = [lead + token.token + rest for lead in LEADS]
    token_id = expanded.first_new_id + index
    return next((text for text in texts if token_id in expanded.encode(text)), texts[0])


def snippets_header(
    records: Sequence[TokenSnippets], header: Mapping[str, Any], *, config: CollectConfig, corpus: Sequence[str],
    left_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the header of the artifact: what was collected from what, and which tokens are short of text.

    Args:
        records: The tokens with their snippets.
        header: The header of the candidates that they come from.
        config: The options of `collect`.
        corpus: The sources of the corpus, as they were given.
        left_out: What of them was not read.
    """
    return {
        "base": header["base"], "options": {**header["options"], **asdict(config)}, "corpus": list(corpus),
        "left_out": dict(left_out or {}),
        "snippets": sum(len(record.snippets) for record in records),
        "generated": sum(record.num_generated for record in records),
        "inside": sum(record.num_inside for record in records),
        "short": [records[i].new_token.token for i in short_of_snippets(records, config)],
    }


def write_snippets(
    path: Path, records: Sequence[TokenSnippets], header: Mapping[str, Any], *, config: CollectConfig,
    corpus: Sequence[str], left_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write what was collected: a header, then one line per token in token-id order.

    Args:
        path: The file; replaced if it is there.
        records: What `collect` returned.
        header: As for `snippets_header`.
        config: As for `snippets_header`.
        corpus: As for `snippets_header`.
        left_out: As for `snippets_header`.

    Returns:
        The header.
    """
    new_header = snippets_header(records, header, config=config, corpus=corpus, left_out=left_out)
    save_snippets(path, records, new_header)
    return new_header


def save_snippets(path: Path, records: Iterable[TokenSnippets], header: dict[str, Any]) -> None:
    """Write tokens with their snippets and their header, atomically."""
    write_jsonl(path, "snippets", header, (record.to_json() for record in records))


def read_snippets(path: Path) -> tuple[dict[str, Any], list[TokenSnippets]]:
    """Read the artifact of `collect` back.

    Returns:
        The header, and the tokens with their snippets in token-id order.

    Raises:
        UsageError: If the file is missing, damaged or another artifact.
    """
    return read_tokens(path, ("snippets",), TokenSnippets.from_json)


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
    ids: Ids,
    expansion: Expansion,
    reservoirs: Mapping[int, _Reservoir],
    config: CollectConfig,
    rng: np.random.Generator,
) -> None:
    """Offer every occurrence in one document to the reservoir of its token id, if there is one."""
    at = np.flatnonzero(expansion.is_new(ids))
    if not len(at):
        return
    edges = expansion.edges(ids)
    draws, befores = rng.random(len(at)), rng.random(len(at))
    for position, draw, before in zip(at.tolist(), draws.tolist(), befores.tolist(), strict=True):
        reservoir = reservoirs.get(int(ids[position]))
        if reservoir is None:
            continue
        if (place := reservoir.place(config.snippets, draw)) is not None:
            reservoir.snippets[place : place + 1] = [_window(ids, edges, position, before, config.window)]


def _splits(expanded: ExpandedTokenizer, merged_from: Sequence[tuple[int, ...]], wanted: Set[int]) -> _Splits:
    """Return for each new id the ways to write it such that a wanted part of it shows, with the place of that part."""
    ways: _Splits = {}
    numbers = range(len(merged_from))
    for number in sorted(numbers, key=lambda i: len(expanded.tokens[i].run)):  # parts come before what is made of them
        parts, found = merged_from[number], []
        for at, part in enumerate(parts):
            found += [(parts, at)] if part in wanted else []
            found += [((*parts[:at], *ids, *parts[at + 1 :]), at + inner) for ids, inner in ways.get(part, ())]
        if found:
            ways[expanded.first_new_id + number] = found
    return ways


def _sample_inside(
    ids: Ids, expansion: Expansion, splits: _Splits, reservoirs: Mapping[int, _Reservoir], config: CollectConfig,
    rng: np.random.Generator,
) -> None:
    """Offer every part of a longer token in one document to the reservoir of that part."""
    for position in np.flatnonzero(expansion.is_new(ids)).tolist():
        for written, inner in splits.get(int(ids[position]), ()):
            reservoir = reservoirs[written[inner]]
            if (place := reservoir.place(config.snippets, rng.random())) is None:
                continue
            # Each id is at least one base id, so what lies further away is in no window.
            start = max(0, position - config.window)
            near = np.concatenate((ids[start:position], written, ids[position + 1 : position + config.window + 1]))
            window = _window(near, expansion.edges(near), position - start + inner, rng.random(), config.window)
            reservoir.snippets[place : place + 1] = [window]


def _topped_up(record: TokenSnippets, inside: _Reservoir, config: CollectConfig) -> TokenSnippets:
    """Give a token that is short of snippets some of those where it is part of a longer one."""
    if len(record.snippets) >= config.min_snippets:
        return record
    new = list(dict.fromkeys(inside.snippets))[: config.snippets - len(record.snippets)]
    return replace(record, snippets=(*record.snippets, *(ids for ids, _ in new)),
                   positions=(*record.positions, *(at for _, at in new)), num_inside=len(new))


def _window(ids: Ids, edges: Ids, position: int, before: float, window: int) -> tuple[tuple[int, ...], int]:
    """Cut a window of about `window` base ids around a position; returns expanded ids and the place inside."""
    start_base = max(0, int(edges[position]) - int(before * MAX_BEFORE * window))
    # The run that holds the base id `start_base` begins at the last edge that is not beyond it.
    start = int(np.searchsorted(edges, start_base, side="right")) - 1
    stop = int(np.searchsorted(edges, edges[start] + window, side="right")) - 1
    return tuple(ids[start : max(stop, position + 1)].tolist()), position - start


def _record(token: NewToken, reservoir: _Reservoir) -> TokenSnippets:
    # The same window twice is one piece of evidence; templated text has many.
    unique = list(dict.fromkeys(reservoir.snippets))
    return TokenSnippets(token, tuple(ids for ids, _ in unique), tuple(at for _, at in unique), reservoir.seen)
