"""Measure how well the model reads new tokens: base, mean-of-pieces and distilled rows side by side.

Shape suffixes: T positions, P predicted places, D hidden size, N new rows.

*Reading.* Every piece of held-out text is predicted twice: from base context, and from a context in
which all new tokens are merged. The pieces inside a new token need a context that ends in the middle
of it; they get short branches off the merged text, in the same forward pass. Both predictions are
over base tokens and cover the same bytes, so their bits per byte compare.

*Writing.* Bits per byte of the expanded tokenization: what it would cost the model to produce the
new tokens themselves. And `vocabext.evaluate.held_out`: whether it writes them where base writes their
pieces, how many characters a decode step gives, and what that does to greedy and sampled text.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vocabext.checkpoint.folder import Checkpoint, Rows, open_checkpoint, resolve_model
from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.rows import mean_rows
from vocabext.checkpoint.vocabulary import HEAD_BIAS
from vocabext.corpus import Document, left_out_of
from vocabext.errors import CorpusError, UsageError
from vocabext.evaluate.held_out import IDENTICAL, HeldOut, measure_held_out
from vocabext.files.atomic import write_json
from vocabext.model.branches import Branches
from vocabext.model.frozen import FrozenModel, check_runs_on_rows, load_model, offloading
from vocabext.model.support import check_runs
from vocabext.options import EvalConfig
from vocabext.progress import Progress, no_progress
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, load_base_of, load_expanded
from vocabext.tokens import Expansion, Ids, NewToken

EVAL_NAME = "eval.json"
BOOTSTRAP_DRAWS = 1000
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
    row_sets: Sequence[RowSet], config: EvalConfig, progress: Progress = no_progress,
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
    sums = {"base": _Sums(np.zeros(len(texts)), np.zeros(len(texts))), **{
        rows.name: _Sums(np.zeros(len(texts)), np.zeros(len(texts))) for rows in row_sets}}
    num_bytes, num_pieces = np.zeros(len(texts)), np.zeros(len(texts))
    with progress("reading held-out text", len(windows) * (1 + len(row_sets)), "windows") as task:
        for window in windows:
            base_ids = expanded.expansion.unmerge(window.expanded)
            nats = _base_nats(model, base_ids, window.num_prefix, base)
            sums["base"].reading_nats[window.document] += nats
            sums["base"].writing_nats[window.document] += nats
            num_bytes[window.document] += window.num_bytes
            num_pieces[window.document] += len(base_ids) - max(1, window.num_prefix)
            task.advance()
            for rows in row_sets:
                reading, writing = _expanded_nats(model, window, expanded, base, rows)
                sums[rows.name].reading_nats[window.document] += reading
                sums[rows.name].writing_nats[window.document] += writing
                task.advance()
    prompts = _prompts(pairs, base, expanded, model, config)
    written: dict[str, Any] | None = None
    if prompts:
        held_out = HeldOut([w.expanded for w in windows], prompts, len(base.prefix_ids), config.continuation,
                           expanded.decode)
        written = measure_held_out(model, expanded.expansion, held_out, {
            rows.name: Rows(rows.input_ND, rows.output_ND, rows.bias_N) for rows in row_sets}, progress)
    return {"context": config.context, "continuation": config.continuation,
            **_summary(texts, pairs, expanded, sums, num_bytes, num_pieces, written)}


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
    own = RowSet("distilled", input_ND, output_ND, _new_bias(checkpoint, new))
    with offloading(folder) as elsewhere:
        model = load_model(base_folder, device=config.device, dtype=config.dtype, trust_remote_code=trust_remote_code,
                           max_memory=config.max_memory, offload_folder=elsewhere)
        row_sets = [_mean_rows(model, tokens)] if manifest.method == "mean" else [_mean_rows(model, tokens), own]
        found = evaluate(documents, model, base, expanded, row_sets, config, progress)
    result = {"artifact": "eval", "version": 1, "model": str(folder), "against": against,
              "options": asdict(config), "left_out": left_out_of(documents), **found}
    write_json(folder / EVAL_NAME, result)
    return result


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


@torch.no_grad()
def _base_nats(model: FrozenModel, ids: Ids, num_prefix: int, base: BaseTokenizer) -> float:
    """Return the negative log likelihood of base ids from base context."""
    first = max(1, num_prefix)
    inputs = torch.from_numpy(ids).to(model.device)
    hidden_TD = model.hidden(model.embed(inputs[None]))[0]
    logs = model.log_probabilities(hidden_TD[first - 1 : -1], first_new_id=base.first_new_id)
    return -float(logs.gather(1, inputs[first:, None]).sum())


@torch.no_grad()
def _expanded_nats(
    model: FrozenModel, window: _Window, expanded: ExpandedTokenizer, base: BaseTokenizer, rows: RowSet
) -> tuple[float, float]:
    """Return nats of the base pieces, and of the expanded ids, both from merged context."""
    layout = _lay_out(window.expanded, max(1, window.num_prefix), expanded)
    ids, positions, visible = (torch.from_numpy(a).to(model.device)
                               for a in (layout.ids, layout.positions, layout.visible))
    inputs_BTD = model.embed(ids[None], rows.input_ND.to(model.device), expanded.first_new_id)
    hidden_TD = model.hidden(inputs_BTD, branches=Branches(positions[None], visible[None]))[0]
    logs = model.log_probabilities(hidden_TD[layout.sources], first_new_id=base.first_new_id)
    reading = -float(logs.gather(1, torch.from_numpy(layout.targets).to(model.device)[:, None]).sum())
    first = max(1, window.num_prefix)
    stem = len(window.expanded)
    logs = model.log_probabilities(hidden_TD[first - 1 : stem - 1], first_new_id=base.first_new_id,
                                   new_rows_ND=rows.output_ND.to(model.device), new_bias_N=rows.bias_N)
    # A new id's column: the base rows in the softmax are exactly the ids below the first new one.
    return reading, -float(logs.gather(1, ids[first:stem, None]).sum())


@dataclass(frozen=True)
class _Layout:
    """The merged text (the stem) and, behind it, a branch for the inner pieces of each new token."""

    ids: Ids
    positions: Ids
    visible: npt.NDArray[np.bool_]  # (T, T)
    sources: Ids  # positions that predict
    targets: Ids  # the base piece that each predicts


def _lay_out(stem: Ids, first: int, expanded: ExpandedTokenizer) -> _Layout:
    """Lay out the stem and its branches.

    Args:
        stem: Expanded ids of the window.
        first: Index of the first id that is predicted.
        expanded: The tokenizer.
    """
    expansion, predicted = expanded.expansion, stem[first:]
    pieces, edges = expansion.unmerge(predicted), expansion.edges(predicted)
    # Each piece belongs to an id of the stem, and is predicted from where the one before it was read.
    owners = np.repeat(np.arange(first, len(stem)), np.diff(edges))
    depths = np.arange(len(pieces)) - np.repeat(edges[:-1], np.diff(edges))
    on_branch = np.ones(len(pieces), np.bool_)
    on_branch[edges[1:] - 1] = False  # what follows the last piece is predicted from the new token itself
    read_at = len(stem) - 1 + np.cumsum(on_branch)
    sources = np.where(depths == 0, owners - 1, np.concatenate(([0], read_at[:-1])))
    ids = np.concatenate((stem, pieces[on_branch]))
    positions = np.concatenate((np.arange(len(stem)), (owners + depths)[on_branch]))
    parent, order = np.concatenate((np.full(len(stem), -1), owners[on_branch])), np.arange(len(ids))
    on_stem = parent < 0
    # The stem sees its own past; a branch sees the stem before its token, and its own past.
    past = order <= order[:, None]
    seen_by_branch = (on_stem & (order < parent[:, None])) | ((parent == parent[:, None]) & past)
    visible = np.where(on_stem[:, None], on_stem & past, seen_by_branch)
    return _Layout(ids, positions, visible, sources, pieces)


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
    sums: dict[str, _Sums], num_bytes: Floats, num_pieces: Floats, writing: dict[str, Any] | None,
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
            "target_nll_nats": float(s.reading_nats.sum() / num_pieces.sum()),
            "bits_per_byte": float(s.reading_nats.sum() / math.log(2) / num_bytes.sum()),
            "bits_per_byte_writing": float(s.writing_nats.sum() / math.log(2) / num_bytes.sum()),
            "greedy_same_share": found and writing and found[IDENTICAL] / writing["base"]["prompts"],
            "greedy_common_characters": found and found["common_characters"],
        })
    gap, interval = _gap_recovered(sums)
    new_share = sum(int(expanded.expansion.is_new(e).sum()) for _, e in pairs) / max(1, expanded_tokens)
    return {
        "documents": len(texts),
        "bytes": int(num_bytes.sum()),
        "pieces": int(num_pieces.sum()),
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
