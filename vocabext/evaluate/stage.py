"""Measure how well the model reads new tokens: base, mean-of-pieces and distilled rows side by side.

Shape suffixes: S windows, D hidden size, N new rows.

*Reading.* Every piece of held-out text is predicted twice: from base context, and from a context in
which all new tokens are merged (`vocabext.evaluate.reading`). Both predictions are over base tokens
and cover the same bytes, so their bits per byte compare.

*Writing.* Bits per byte of the expanded tokenization: what it would cost the model to produce the
new tokens themselves. And `vocabext.evaluate.held_out`: whether it writes them where base writes their
pieces, how many characters a decode step gives, and what that does to greedy and sampled text.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vocabext.checkpoint.folder import Checkpoint, Rows, open_checkpoint, resolve_model
from vocabext.checkpoint.manifest import ADAPTER_FOLDER, HEAL_NAME, MANIFEST_NAME, Manifest, read_manifest
from vocabext.checkpoint.rows import mean_rows
from vocabext.checkpoint.vocabulary import HEAD_BIAS
from vocabext.corpus import Document, left_out_of
from vocabext.errors import CorpusError, UsageError
from vocabext.evaluate.held_out import BOOTSTRAP_DRAWS, IDENTICAL, Bodies, HeldOut, measure_held_out
from vocabext.files.atomic import read_object, write_json
from vocabext.model.adapter import load_adapter
from vocabext.model.frozen import FrozenModel, check_runs_on_rows, load_model, offloading
from vocabext.model.support import check_runs
from vocabext.options import EvalConfig
from vocabext.progress import Progress, no_progress
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, load_base_of, load_expanded
from vocabext.tokens import Expansion, Ids, NewToken

EVAL_NAME = "eval.json"
LEAST_CONTEXT = 16

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowSet:
    """Rows of the new tokens, to be measured under a name.

    Attributes:
        name: Such as `mean` or `distilled`.
        input_ND: Input rows.
        output_ND: Output rows.
        bias_N: Entries of the head's bias; None for a head without one.
    """

    name: str
    input_ND: torch.Tensor
    output_ND: torch.Tensor
    bias_N: torch.Tensor | None = None


@dataclass(frozen=True)
class _Window:
    """A piece of a document, in both tokenizations, framed as a prompt."""

    document: int
    expanded: Ids
    num_prefix: int
    num_bytes: int


@dataclass
class _Sums:
    """Totals per document: nats over base pieces, nats over canonical tokens."""

    reading_nats: Floats
    writing_nats: Floats


def evaluate(
    documents: Iterable[Document], model: FrozenModel, base: BaseTokenizer, expanded: ExpandedTokenizer,
    row_sets: Sequence[RowSet], config: EvalConfig, progress: Progress = no_progress, bodies: Bodies | None = None,
) -> dict[str, object]:
    """Measure the base model and each set of rows on held-out documents.

    Args:
        documents: Held-out text: none of it may have been mined or distilled from.
        model: The frozen base model.
        base: Its tokenizer.
        expanded: The extended tokenizer.
        row_sets: Rows to compare; `mean` and `distilled` give the share of the gap recovered.
        config: How much to read.
        progress: Where to report.
        bodies: By name, the bodies of rows that have another than the base's.

    Returns:
        The content of eval.json.

    Raises:
        CorpusError: If no document is long enough to be measured.
        UsageError: If the model cannot be run on rows.
    """
    check_runs_on_rows(model.model.config)
    texts = _texts(documents, config.max_bytes)
    pairs = list(zip(base.encode_batch(texts), expanded.encode_batch(texts), strict=True))
    config = _within(config, model, len(base.prefix_ids), expanded.expansion)
    windows = [w for i, (text, (_, ids)) in enumerate(zip(texts, pairs, strict=True))
               for w in _windows(i, ids, text, expanded, base, config)]
    if not windows:
        raise CorpusError("no held-out document is longer than a few tokens; give more text to --corpus")
    held_out = HeldOut([w.expanded for w in windows], _prompts(pairs, base, expanded, model, config),
                       len(base.prefix_ids), config.continuation, expanded.decode)
    nats, written = measure_held_out(model, expanded.expansion, held_out, {
        rows.name: Rows(rows.input_ND, rows.output_ND, rows.bias_N) for rows in row_sets}, progress, bodies)
    documents_S = np.asarray([window.document for window in windows])

    def per_document(values_S: Iterable[float]) -> Floats:
        sums: Floats = np.bincount(documents_S, np.asarray(list(values_S), np.float64), len(texts)).astype(np.float64)
        return sums

    sums = {name: _Sums(per_document(of.reading_S), per_document(of.writing_S)) for name, of in nats.items()}
    pieces = [int(expanded.expansion.run_lengths(w.expanded).sum()) - max(1, w.num_prefix) for w in windows]
    return {"context": config.context, "continuation": config.continuation,
            **_summary(texts, pairs, expanded, sums, sum(w.num_bytes for w in windows), sum(pieces), written)}


def evaluate_folder(
    folder: Path, against: str, documents: Iterable[Document], config: EvalConfig, *, trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> dict[str, object]:
    """Measure an expanded checkpoint against its base and write eval.json into it.

    The base model is loaded once; the rows of the expanded one are read from its folder.

    Args:
        folder: The expanded checkpoint.
        against: The base: folder or hub id.
        documents: Held-out text.
        config: How much to read.
        trust_remote_code: Run code that comes with the base model.
        progress: Where to report.

    Returns:
        The content of eval.json.

    Raises:
        UsageError: If `against` has other token ids than the base that the folder was made from, or cannot be run
            on rows.
    """
    manifest = read_manifest(folder)
    tokens = [record.new_token for record in manifest.tokens]
    base_folder = resolve_model(against)
    check_runs(base_folder, trust_remote_code=trust_remote_code)
    base = load_base_of(base_folder, manifest.first_new_id, trust_remote_code=trust_remote_code)
    if manifest.first_new_id != base.first_new_id:
        raise UsageError(f"{folder} was made from {manifest.base.model} with {manifest.first_new_id} token ids, but "
                         f"{against} has {base.first_new_id}; pass the model it was made from as --against")
    expanded = load_expanded(folder, Expansion(tokens, manifest.first_new_id))
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    new = slice(manifest.first_new_id, manifest.first_new_id + len(tokens))
    input_ND, output_ND = (checkpoint.read(n)[new] for n in (checkpoint.vocab_tensors[0], checkpoint.vocab_tensors[-1]))
    own = RowSet("healed" if manifest.adapter else "distilled", input_ND, output_ND, _new_bias(checkpoint, new))
    with offloading(folder) as elsewhere:
        model = load_model(base_folder, device=config.device, dtype=config.dtype, trust_remote_code=trust_remote_code,
                           max_memory=config.max_memory, offload_folder=elsewhere)
        row_sets = [_mean_rows(model, tokens)] if manifest.method == "mean" else [_mean_rows(model, tokens), own]
        bodies = {}
        if manifest.adapter:
            row_sets[1:1] = _rows_before(folder, manifest)
            bodies["healed"] = _healed_body(model, folder, manifest, config, trust_remote_code)
        found = evaluate(documents, model, base, expanded, row_sets, config, progress, bodies)
    result = {"artifact": "eval", "version": 1, "model": str(folder), "against": against,
              "options": asdict(config), "left_out": left_out_of(documents), **found}
    write_json(folder / EVAL_NAME, result)
    return result


def _rows_before(folder: Path, manifest: Manifest) -> list[RowSet]:
    """Return the rows that `heal` began with, if the folder that has them is still there; else none."""
    before = Path(str((read_object(folder / HEAL_NAME) or {}).get("model", "")))
    if not (before / MANIFEST_NAME).is_file():
        return []
    earlier = read_manifest(before)
    if [token.run for token in earlier.tokens] != [token.run for token in manifest.tokens] or earlier.adapter:
        return []
    checkpoint = open_checkpoint(before)
    new = slice(earlier.first_new_id, earlier.first_new_id + len(earlier.tokens))
    input_ND, output_ND = (checkpoint.read(n)[new] for n in (checkpoint.vocab_tensors[0], checkpoint.vocab_tensors[-1]))
    return [RowSet("distilled", input_ND, output_ND, _new_bias(checkpoint, new))]


def _healed_body(
    model: FrozenModel, folder: Path, manifest: Manifest, config: EvalConfig, trust_remote_code: bool
) -> Callable[[], AbstractContextManager[FrozenModel]]:
    """Return what opens the healed body: the base with its adapter switched on, or the one that holds it."""
    if manifest.merged:
        merged = load_model(folder, device=config.device, dtype=config.dtype, trust_remote_code=trust_remote_code)
        return lambda: nullcontext(merged)
    adapter = load_adapter(model, folder / ADAPTER_FOLDER)
    adapter.disable_adapter_layers()

    @contextmanager
    def switched_on() -> Iterator[FrozenModel]:
        adapter.enable_adapter_layers()
        try:
            yield model
        finally:
            adapter.disable_adapter_layers()

    return switched_on


def _mean_rows(model: FrozenModel, tokens: Sequence[NewToken]) -> RowSet:
    bias_V = model.head_bias_V
    return RowSet("mean", mean_rows(model.embedding_VD, tokens), mean_rows(model.head_VD, tokens),
                  None if bias_V is None else mean_rows(bias_V, tokens))


def _new_bias(checkpoint: Checkpoint, new: slice) -> torch.Tensor | None:
    """Read the new entries of the head's bias: they may keep tokens from being written whatever their rows say."""
    names = [name for name, tensor in checkpoint.row_tensors.items() if tensor.role == HEAD_BIAS]
    return checkpoint.read(names[0])[new] if names else None


def _texts(documents: Iterable[Document], max_bytes: int) -> list[str]:
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= max_bytes:
            break
    return texts


def _windows(
    document: int, ids: Sequence[int], text: str, expanded: ExpandedTokenizer, base: BaseTokenizer, config: EvalConfig
) -> Iterator[_Window]:
    """Cut one document into windows of at most `config.context` base ids, at expanded token edges."""
    array = np.asarray(ids, np.int64)
    edges = expanded.expansion.edges(array)
    prefix = np.asarray(base.prefix_ids, np.int64)
    total = len(text.encode())
    start = 0
    while start < len(array):
        stop = max(start + 1, int(np.searchsorted(edges, edges[start] + config.context, side="right")) - 1)
        framed = np.concatenate((prefix, array[start:stop]))
        pieces = int(edges[stop] - edges[start])
        if len(framed) > 1:
            # The first piece has no context without a prefix and is not predicted; its bytes count on both sides.
            yield _Window(document, framed, len(prefix), round(total * pieces / int(edges[-1])))
        start = stop


def _within(config: EvalConfig, model: FrozenModel, num_prefix: int, expansion: Expansion) -> EvalConfig:
    """Shorten windows and continuations to what the model takes.

    Raises:
        UsageError: If it takes hardly anything.
    """
    room, longest = model.max_positions - num_prefix, _longest_run(expansion)
    if room < LEAST_CONTEXT + longest:
        raise UsageError(f"the model takes {model.max_positions} positions, {num_prefix} of them in front of every "
                         f"text; to measure a token of {longest} base ids, eval needs {LEAST_CONTEXT + longest} more")
    return replace(config, context=min(config.context, room),
                   continuation=min(config.continuation, (room - longest) // 2))


def _longest_run(expansion: Expansion) -> int:
    return max(len(token.run) for token in expansion.tokens)


def _prompts(
    pairs: Sequence[tuple[list[int], list[int]]], base: BaseTokenizer, expanded: ExpandedTokenizer, model: FrozenModel,
    config: EvalConfig,
) -> list[Ids]:
    """Return the beginnings of documents that hold a new token, in expanded ids.

    With what is written after them, and in base ids, they are no longer than the model takes.
    """
    expansion, prefix = expanded.expansion, np.asarray(base.prefix_ids, np.int64)
    budget = max(16, min(config.context, model.max_positions - config.continuation) // 2)
    most = model.max_positions - len(prefix) - config.continuation - _longest_run(expansion) + 1
    prompts: list[Ids] = []
    for _, ids in pairs:
        if len(prompts) == config.prompts:
            break
        array = np.asarray(ids[:budget], np.int64)
        short = array[: int(np.searchsorted(expansion.edges(array), most, side="right")) - 1]
        if len(array) == budget and expansion.is_new(short).any():
            prompts.append(np.concatenate((prefix, short)))
    return prompts


def _summary(
    texts: Sequence[str], pairs: Sequence[tuple[list[int], list[int]]], expanded: ExpandedTokenizer,
    sums: dict[str, _Sums], num_bytes: int, num_pieces: int, writing: dict[str, Any] | None,
) -> dict[str, object]:
    base_tokens, expanded_tokens = sum(len(b) for b, _ in pairs), sum(len(e) for _, e in pairs)
    greedy = {found["name"]: found["greedy"] for found in writing["rows"]} if writing else {}
    if writing:
        own = writing["base"]
        greedy["base"] = {IDENTICAL: own["prompts"], "common_characters": own["characters"] / own["prompts"]}
    rows = []
    for name, s in sums.items():
        found = greedy.get(name)
        rows.append({
            "name": name,
            "tokens": base_tokens if name == "base" else expanded_tokens,
            "target_nll_nats": float(s.reading_nats.sum() / num_pieces),
            "bits_per_byte": float(s.reading_nats.sum() / math.log(2) / num_bytes),
            "bits_per_byte_writing": float(s.writing_nats.sum() / math.log(2) / num_bytes),
            "greedy_same_share": found and writing and found[IDENTICAL] / writing["base"]["prompts"],
            "greedy_common_characters": found and found["common_characters"],
        })
    gap, interval = _gap_recovered(sums)
    new_share = sum(int(expanded.expansion.is_new(e).sum()) for _, e in pairs) / max(1, expanded_tokens)
    return {
        "documents": len(texts),
        "bytes": num_bytes,
        "pieces": num_pieces,
        "rows": rows,
        "gap_recovered": gap,
        "gap_recovered_interval": interval,
        "shorter": {"base_tokens": base_tokens, "expanded_tokens": expanded_tokens,
                    "ratio": base_tokens / max(1, expanded_tokens), "new_token_share": new_share},
        "writing": writing,
    }


def _gap_recovered(sums: dict[str, _Sums]) -> tuple[float | None, list[float] | None]:
    """Return (mean - distilled) / (mean - base), with a 95 % bootstrap interval over documents."""
    if "mean" not in sums or "distilled" not in sums:
        return None, None
    base, mean, ours = (sums[name].reading_nats for name in ("base", "mean", "distilled"))
    if mean.sum() <= base.sum():
        return None, None  # there is no gap to recover
    rng = np.random.default_rng(0)
    at = rng.integers(0, len(base), (BOOTSTRAP_DRAWS, len(base)))
    gaps = (mean - base)[at].sum(1)
    draws = (mean - ours)[at].sum(1)[gaps > 0] / gaps[gaps > 0]
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (math.nan, math.nan)
    return float((mean.sum() - ours.sum()) / (mean.sum() - base.sum())), [float(low), float(high)]
