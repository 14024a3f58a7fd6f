"""How much shorter a corpus becomes: tokens per document before and after, and what follows from it.

Both tokenizers encode every document once, in batches and on all cores; while they encode one batch, the
previous one is counted. Each document is also checked for the invariant: replacing each new token by its run must
give the base ids.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vocabext.checkpoint.folder import resolve_model
from vocabext.checkpoint.manifest import has_manifest, read_manifest
from vocabext.corpus import Document, left_out_of, read_documents
from vocabext.progress import Progress, no_progress
from vocabext.serve.model import Encoder, cache_bytes_per_token, context_length, load_encoder, read_config
from vocabext.serve.provenance import provenance
from vocabext.tokens import Expansion, NewToken

FORMAT_VERSION = 2
BATCH_CHARACTERS = 2_000_000
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
HISTOGRAM_BINS = 40
NUM_TOP, NUM_NEVER = 40, 200
PASSAGE_RANKS = (0.5, 0.75, 0.25)  # typical, then from the better and from the worse half
PASSAGE_CHARACTERS, POOL_SIZE = 360, 400
NUM_RESAMPLES = 2000
RESAMPLED_AT_ONCE = 1_000_000  # documents of all resamples that are drawn together

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Encoded = tuple[Sequence[Document], list[list[int]], list[list[int]]]


@dataclass
class Tally:
    """What has been counted so far.

    Attributes:
        counts: How often each new token occurred.
        base: Base tokens of each document.
        expanded: Expanded tokens of each document.
        characters: Characters of each document.
        num_new: New tokens in all documents.
        num_bytes: UTF-8 bytes of all documents.
        num_differing: Documents whose expanded ids do not unmerge to the base ids.
        first_differing: Name of the first of them.
    """

    counts: Ids
    base: list[int] = field(default_factory=list)
    expanded: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    num_new: int = 0
    num_bytes: int = 0
    num_differing: int = 0
    first_differing: str = ""


def measure_lengths(
    base: str, expanded: str, corpus: Sequence[str], *, text_field: str = "text", trust_remote_code: bool = False,
    seed: int = 0, progress: Progress = no_progress, say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Tokenize a corpus with both models' tokenizers.

    Args:
        base: Base model, folder or hub id.
        expanded: Expanded model, folder or hub id.
        corpus: Documents, best ones that `mine` has not seen.
        text_field: Field with the text in `.jsonl` and `.parquet`.
        trust_remote_code: Run Python code that comes with the model.
        seed: Seed of the interval and of the choice of passages.
        progress: Told of every document.
        say: Told what of the corpus is not read.

    Returns:
        The content of lengths.json.

    Raises:
        CorpusError: If the corpus cannot be read or holds no text.
        TokenizerError: If one of the tokenizers cannot be loaded.
    """
    about = provenance()
    documents = read_documents(corpus, text_field=text_field, say=say)
    folders = resolve_model(base), resolve_model(expanded)
    encoders = [load_encoder(folder, trust_remote_code=trust_remote_code) for folder in folders]
    expansion = expansion_of(folders[1], encoders[0])
    tally = Tally(np.zeros(expansion.num_new, np.int64))
    pool: list[Document] = []
    choose = random.Random(seed)
    started = time.perf_counter()
    with progress("encoding", None, "documents") as task:
        for batch, base_rows, rows in encode_ahead(_batches(documents), encoders[0], encoders[1]):
            count_batch(tally, batch, base_rows, rows, expansion)
            _sample(pool, batch, len(tally.base), choose)
            task.advance(len(batch))
    seconds = time.perf_counter() - started
    return {
        "artifact": "lengths", "version": FORMAT_VERSION, "base": base, "expanded": expanded, "corpus": list(corpus),
        "left_out": left_out_of(documents),
        **summarize(tally, expansion, seed=seed),
        "cache": cache_savings(folders[0], tally),
        "passages": _passages(pool, encoders[0], encoders[1], expansion.first_new_id),
        "encoding_seconds": seconds, "megabytes_per_second": 2 * tally.num_bytes / 1e6 / seconds,
        "provenance": about,
    }


def encode_ahead(batches: Iterable[Sequence[Document]], base: Encoder, expanded: Encoder) -> Iterator[Encoded]:
    """Yield each batch with its base ids and its expanded ids, and encode the next batch meanwhile.

    The tokenizers run without Python's lock, so that counting a batch costs no time of its own.
    """
    def encode(batch: Sequence[Document]) -> Encoded:
        texts = [document.text for document in batch]
        return batch, base.encode_batch(texts), expanded.encode_batch(texts)

    with ThreadPoolExecutor(1) as ahead:
        waiting = None
        for batch in batches:
            following = ahead.submit(encode, batch)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def expansion_of(folder: Path, base: Encoder) -> Expansion:
    """Return the new tokens of a model folder: none if it is no expanded checkpoint."""
    if not has_manifest(folder):
        return Expansion((), base.num_ids)
    manifest = read_manifest(folder)
    return Expansion([record.new_token for record in manifest.tokens], manifest.first_new_id)


def count_batch(
    tally: Tally, batch: Sequence[Document], base_rows: Sequence[Sequence[int]], rows: Sequence[Sequence[int]],
    expansion: Expansion,
) -> None:
    """Add documents to the tally, with their base ids (`base_rows`) and their expanded ids (`rows`)."""
    flat, base_flat = _flat(rows), _flat(base_rows)
    bounds, base_bounds = _bounds(rows), _bounds(base_rows)
    known = flat < expansion.end_id  # another tokenizer may give ids that nothing here stands for
    tally.counts += expansion.counts(flat[known])
    tally.base += map(len, base_rows)
    tally.expanded += map(len, rows)
    tally.num_new += int(expansion.is_new(flat).sum())
    tally.characters += [len(document.text) for document in batch]
    tally.num_bytes += sum(len(document.text.encode()) for document in batch)
    if known.all() and np.array_equal(expansion.edges(flat)[bounds], base_bounds) and np.array_equal(
            expansion.unmerge(flat), base_flat):
        return
    for document, base_ids, ids in zip(batch, base_rows, rows, strict=True):
        array = np.asarray(ids, np.int64)
        if (array >= expansion.end_id).any() or not np.array_equal(expansion.unmerge(array), base_ids):
            tally.num_differing += 1
            tally.first_differing = tally.first_differing or document.name


def _flat(rows: Sequence[Sequence[int]]) -> Ids:
    return np.fromiter(chain.from_iterable(rows), np.int64, sum(map(len, rows)))


def _bounds(rows: Sequence[Sequence[int]]) -> Ids:
    return np.cumsum([0, *map(len, rows)])


def summarize(tally: Tally, expansion: Expansion, *, seed: int = 0) -> dict[str, Any]:
    """Turn the counts into what lengths.json says about the corpus and about the tokens."""
    base, expanded = np.asarray(tally.base), np.asarray(tally.expanded)
    characters, num_base, num_expanded = sum(tally.characters), int(base.sum()), int(expanded.sum())
    counted = base > 0
    saved_share = 1 - expanded[counted] / base[counted]
    edges = np.linspace(min(0.0, float(saved_share.min())), max(0.05, float(saved_share.max())), HISTOGRAM_BINS + 1)
    per_1000 = {name: 1000 * tokens[counted] / np.asarray(tally.characters)[counted]
                for name, tokens in (("base", base), ("expanded", expanded))}
    saved = tally.counts * np.asarray([len(token.run) - 1 for token in expansion.tokens], np.int64)
    lengths = np.asarray([len(token.token) for token in expansion.tokens], np.int64)
    return {
        "documents": len(base), "characters": characters, "bytes": tally.num_bytes,
        "base_tokens": num_base, "expanded_tokens": num_expanded,
        "saved_share": 1 - num_expanded / num_base,
        "saved_share_interval": bootstrap_saved_share(base, expanded, seed=seed),
        "base_tokens_per_document": num_base / len(base),
        "expanded_tokens_per_document": num_expanded / len(base),
        "base_tokens_per_1000_characters": 1000 * num_base / characters,
        "expanded_tokens_per_1000_characters": 1000 * num_expanded / characters,
        "tokens_per_document_percentiles": {"base": percentiles(base), "expanded": percentiles(expanded)},
        "tokens_per_1000_characters_percentiles": {name: percentiles(found) for name, found in per_1000.items()},
        "tokens_per_1000_characters_histogram": _histograms(per_1000),
        "saved_share_percentiles": percentiles(saved_share),
        "saved_share_histogram": {"edges": edges.tolist(), "documents": np.histogram(saved_share, edges)[0].tolist()},
        "documents_not_shorter": int((expanded >= base).sum()),
        "documents_longer": int((expanded > base).sum()),
        "invariant": {"documents": len(base), "differing": tally.num_differing, "first": tally.first_differing},
        "new_tokens": {
            "total": expansion.num_new,
            "used": int((tally.counts > 0).sum()),
            "share_of_tokens": tally.num_new / num_expanded,
            "share_of_characters": float((tally.counts * lengths).sum()) / characters,
            "most_saving": _most_saving(expansion.tokens, tally.counts, saved),
            "never_used_count": int((tally.counts == 0).sum()),
            "never_used": [t.token for t, n in zip(expansion.tokens, tally.counts, strict=True) if n == 0][:NUM_NEVER],
        },
    }


def percentiles(values: Ids | Floats) -> dict[str, float]:
    """Return the percentiles that describe a distribution here, by name."""
    return {str(p): float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def _histograms(series: Mapping[str, Floats]) -> dict[str, list[float]]:
    """Count several series in the same bins, from the lowest to the highest value that is no outlier."""
    everything = np.concatenate(list(series.values()))
    low, high = np.percentile(everything, (0.5, 99.5))
    edges = np.linspace(low, max(high, low + 1), HISTOGRAM_BINS + 1)
    return {"edges": edges.tolist(), **{name: np.histogram(np.clip(found, edges[0], edges[-1]), edges)[0].tolist()
                                        for name, found in series.items()}}


def bootstrap_saved_share(base: Ids, expanded: Ids, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the share of tokens saved, over which documents the corpus happens to hold."""
    generator = np.random.default_rng(seed)
    at_once = max(1, RESAMPLED_AT_ONCE // len(base))
    shares: list[float] = []
    while len(shares) < NUM_RESAMPLES:
        drawn_RD = generator.integers(len(base), size=(min(at_once, NUM_RESAMPLES - len(shares)), len(base)))
        shares += (1 - expanded[drawn_RD].sum(1) / np.maximum(1, base[drawn_RD].sum(1))).tolist()
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)


def cache_savings(folder: Path, tally: Tally) -> dict[str, Any] | None:
    """Return what fewer tokens mean for a 16-bit cache of keys and values, and for the context.

    None for a config that does not describe a plain attention cache.
    """
    per_token, context = cache_bytes_per_token(read_config(folder)), context_length(folder)
    if per_token is None:
        return None
    base, expanded, characters = sum(tally.base), sum(tally.expanded), sum(tally.characters)
    return {
        "bytes_per_token": per_token,
        "base_bytes_per_document": per_token * base / len(tally.base),
        "expanded_bytes_per_document": per_token * expanded / len(tally.base),
        "saved_bytes_per_document": per_token * (base - expanded) / len(tally.base),
        "context_tokens": context,
        "base_context_characters": context and context * characters / base,
        "expanded_context_characters": context and context * characters / expanded,
    }


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _most_saving(tokens: Sequence[NewToken], counts: Ids, saved: Ids) -> list[dict[str, Any]]:
    order = np.argsort(-saved, kind="stable")[:NUM_TOP]
    return [
        {"token": tokens[i].token, "count": int(counts[i]), "base_tokens": len(tokens[i].run),
         "saved_tokens": int(saved[i])}
        for i in order if saved[i] > 0
    ]


def _sample(pool: list[Document], batch: Sequence[Document], seen: int, choose: random.Random) -> None:
    """Keep a uniform sample of the documents; `seen` counts them with this batch."""
    for index, document in enumerate(batch, seen - len(batch)):
        if len(pool) < POOL_SIZE:
            pool.append(document)
        elif (slot := choose.randrange(index + 1)) < POOL_SIZE:
            pool[slot] = document


def _passages(pool: Sequence[Document], base: Encoder, expanded: Encoder, first_new_id: int) -> list[dict[str, Any]]:
    """Cut passages whose saving is typical: from the middle and the quarters of a sample."""
    texts = [_passage(document.text) for document in pool]
    shares = [1 - len(after) / max(1, len(before)) for before, after in
              zip(base.encode_batch(texts), expanded.encode_batch(texts), strict=True)]
    long = [i for i, text in enumerate(texts) if len(text) >= PASSAGE_CHARACTERS // 2] or range(len(texts))
    ranked = sorted(long, key=lambda i: shares[i])
    places = dict.fromkeys(round(rank * (len(ranked) - 1)) for rank in PASSAGE_RANKS)
    return [{
        "document": pool[ranked[place]].name.rpartition("/")[2], "saved_share": shares[ranked[place]],
        "percentile": round(100 * place / max(1, len(ranked) - 1)),
        **{f"{role}_pieces": [(part, token_id >= first_new_id) for part, token_id in encoder.cut(texts[ranked[place]])]
           for role, encoder in (("base", base), ("expanded", expanded))},
    } for place in places]


def _passage(text: str) -> str:
    """Return the beginning of a text up to a space, on one line."""
    text = " ".join(text.split())
    if len(text) <= PASSAGE_CHARACTERS:
        return text
    space = text.rfind(" ", 0, PASSAGE_CHARACTERS + 1)
    return text[: space if space > 0 else PASSAGE_CHARACTERS]
