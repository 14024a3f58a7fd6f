"""From snippets to output rows: what to read, how cautious to be, and which tokens stay silent.

Shape suffixes: N new tokens, D hidden size, P places.
"""

import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from vocabext.checkpoint.rows import mean_rows, row_norms, rows_in_use
from vocabext.checkpoint.vocabulary import MAX_NORM_RATIO, TIED_IN_VLLM
from vocabext.distill.output_rows.fit import BATCH, OutputFit, Targets, longest_runs
from vocabext.distill.overlap import text_numbers
from vocabext.errors import UsageError
from vocabext.model.frozen import PROBE_POSITIONS, FrozenModel
from vocabext.model.logit_map import LogitMap
from vocabext.model.places import HEAD_PLACES, WINDOW_POSITIONS, Places, concatenate, find_places
from vocabext.model.run_tree import RunTree
from vocabext.model.writing import Uses, Writing, find_uses, measure_writing, per_token
from vocabext.options import DistillConfig
from vocabext.progress import Progress, Task, no_progress
from vocabext.tokens import Expansion, Ids, TokenSnippets

# One window in this many judges rows that the others made.
HELD_OUT_EVERY = 8
# Windows that are read between two reports of progress.
WINDOWS_AT_ONCE = 256
# The kind of output rows where nobody asked for another.
DEFAULT = "fit"
# Passes over the places: at first, and for each try of another caution, which goes on from the rows before it.
FIRST_EPOCHS, TRY_EPOCHS = 6.0, 3.0
TRIES = 3
# How wrong use falls as caution grows: with this power of it, roughly. And the highest caution that is aimed at.
POWER, MOST_CAUTION = 0.9, 64.0
# Share of the bound on wrong use that a try aims at: one that aims at all of it misses it half of the time.
AIM = 0.85
# Further tries if none keeps the bound, and by how much each raises the caution at least.
RAISES, RAISE = 4, 1.5
# A row is at most so many times as long as the longest base row in use: longer ones are loud wherever a state is
# unusual. Less than what `verify` allows, as rows are rounded to the dtype of the model afterwards.
LONGEST = 0.97 * MAX_NORM_RATIO
# What stands for zero: a row of exact zeros cannot be told from one that was forgotten.
ALMOST_ZERO = 1e-4
# Places at which the least likely base rows are looked for.
SILENCE_PLACES = 4_096
ROWS_AT_ONCE = 64
UNJUDGED = "no place to judge it by"


@dataclass(frozen=True)
class TokenWriting:
    """How one token is written, on held-out places.

    Attributes:
        token: The text of the token.
        deserved: Places where base's greedy continuation writes its run.
        right: Places where it is on top and base writes its run.
        wrong: Places where it is on top and base writes something else.
        silent: Why it is never written; None if it is.
    """

    token: str
    deserved: int
    right: int
    wrong: int
    silent: str | None = None


@dataclass(frozen=True)
class OutputRows:
    """Output rows of all tokens, and what is known about them.

    Attributes:
        output_ND: The rows, float32.
        kind: `fit`, `mean`, `zero` or `none`.
        held_out: How they write on held-out places; None where nothing was fitted.
        tokens: The same for each token.
        caution: Weight of places where nothing new should be written.
        places: Places that were read.
        leak: Largest probability that one silent row took at a place; None without silent rows.
        silent_ids: The base ids whose mean row the silent row is; empty where no text was read.
        read_seconds: Time for reading the places.
        fit_seconds: Time for the fit.
        bound: Share of held-out places at which they may be wrong; None where nothing was fitted.
        bound_met: Whether they are wrong at no more.
    """

    output_ND: torch.Tensor
    kind: str
    held_out: Writing | None = None
    tokens: tuple[TokenWriting, ...] = ()
    caution: float | None = None
    places: int = 0
    leak: float | None = None
    silent_ids: tuple[int, ...] = ()
    read_seconds: float = 0.0
    fit_seconds: float = 0.0
    bound: float | None = None
    bound_met: bool | None = None

    def summary(self) -> dict[str, object]:
        """Return what a reader wants to know, as JSON-ready values."""
        return {"kind": self.kind, "held_out": None if self.held_out is None else self.held_out.to_json(),
                "written": sum(t.silent is None for t in self.tokens) if self.tokens else None,
                "silent": [asdict(t) for t in self.tokens if t.silent is not None], "caution": self.caution,
                "places": self.places, "leak": self.leak, "silent_ids": list(self.silent_ids),
                "read_seconds": self.read_seconds, "fit_seconds": self.fit_seconds, "bound": self.bound,
                "bound_met": self.bound_met}


@dataclass(frozen=True)
class OutputChoice:
    """Which output rows new tokens get.

    Attributes:
        kind: `fit`, `mean`, `zero` or `none`; `input` where they get none of their own.
        why: Why these and no others; None where they are what was asked for, or the default.
    """

    kind: str
    why: str | None = None


def choose_output_rows(config: DistillConfig, *, architecture: str, tied: bool, biased: bool) -> OutputChoice:
    """Choose the kind of output rows that a model can have.

    The mean of pieces as input rows is the quick baseline, made without text: nothing is fitted then. Some engines
    multiply with the embedding whatever a checkpoint says: there a tied model keeps its one matrix. And nothing is
    fitted to a head with a bias; `patch` gives `none` a bias there that no logit comes up to.

    Args:
        config: Method and options.
        architecture: Name of the model's class.
        tied: Whether its head is its embedding.
        biased: Whether its head has a bias.

    Raises:
        UsageError: If other rows than these were asked for.
    """
    asked = config.output_rows
    if config.method == "mean":  # which other rows are refused with, by the options themselves
        return OutputChoice("input", "--method mean makes no output rows: `patch` takes the mean of each token's run, "
                                     "in the head as well")
    if asked == "input":
        return OutputChoice(asked, None if tied else "the head is a matrix of its own, and --output-rows input makes "
                                                     "no rows for it: `patch` takes the mean of each token's run")
    if tied and architecture in TIED_IN_VLLM:
        why = f"vLLM ties the head of {architecture} to its embedding whatever the config says"
        if asked is not None:
            raise UsageError(f"--output-rows is {asked!r}, but {why}; leave the option out, or pass 'input'")
        return OutputChoice("input", f"{why}: new tokens get no output rows of their own")
    if biased and asked in (None, "fit"):
        why = f"the head of {architecture} has a bias, to which no rows are fitted"
        if asked is not None:
            raise UsageError(f"--output-rows is {asked!r}, but {why}; pass 'none', 'mean' or 'zero'")
        return OutputChoice("none", f"{why}: new tokens are read and not written")
    return OutputChoice(asked or DEFAULT)


def make_output_rows(
    kind: str, records: Sequence[TokenSnippets], model: FrozenModel, expansion: Expansion, *,
    prefix_ids: Sequence[int] = (), places_per_token: int = 200, false_use: float = 0.01, seed: int = 0,
    progress: Progress = no_progress, textless_ids: Collection[int] = (),
) -> OutputRows:
    """Make the output rows of all new tokens.

    Where no snippet is left to judge by, fitted rows would be written blindly: then all tokens stay silent.

    Args:
        kind: `fit`, `mean`, `zero`, or `none` for rows that stay silent. On a head with a bias `fit` is `none`.
        records: The tokens that get a row, with their snippets.
        model: The frozen base model.
        expansion: The new tokens that the snippets are written in; at least those of `records`.
        prefix_ids: What the tokenizer puts in front of a prompt.
        places_per_token: How much of the snippets is read, in base ids per token.
        false_use: Share of held-out places at which a new token may be on top where base writes something else.
        seed: Of every choice.
        progress: Where to report.
        textless_ids: Base ids that no text has: their rows are no examples of what is never written.
    """
    tokens = [record.new_token for record in records]
    mean_ND = mean_rows(model.head_VD, tokens).cpu()
    if kind in ("mean", "zero"):
        return OutputRows(mean_ND if kind == "mean" else ALMOST_ZERO * mean_ND, kind)
    if model.head_bias_V is not None:
        return OutputRows(ALMOST_ZERO * mean_ND, "none", leak=0.0)
    began = time.perf_counter()
    train, held_out = _windows(records, expansion, prefix_ids, places_per_token)
    tree = RunTree.of(tokens)
    parts = [_read(model, windows, tree, expansion.first_new_id, len(prefix_ids), progress)
             for windows in (train, held_out) if windows]
    read_seconds = time.perf_counter() - began
    began = time.perf_counter()
    head_VD, lengths_N = model.head_VD, torch.tensor([len(token.run) for token in tokens])
    usable_V = rows_in_use(head_VD, expansion.first_new_id, textless_ids)
    silent_D, leak, silent_ids = silent_row(head_VD, parts, expansion.first_new_id, model.logit_map, usable_V)
    size = sum(map(len, parts))
    if kind == "none" or not held_out:
        reports = tuple(TokenWriting(token.token, 0, 0, 0, UNJUDGED) for token in tokens) if kind == "fit" else ()
        return OutputRows(silent_D.expand(len(tokens), -1).clone(), kind, None, reports, None, size, leak, silent_ids,
                          read_seconds, time.perf_counter() - began)
    places, judged = parts
    longest = LONGEST * float(row_norms(head_VD[:expansion.first_new_id])[usable_V].max())
    judge = _Judge(records, judged, lengths_N, silent_D, longest, model.logit_map)
    fit = OutputFit(Targets(places, longest_runs(places, lengths_N), model.logit_map), len(tokens), model.device, seed)
    best = _fit(fit, judge, false_use, progress)
    return OutputRows(best.rows_ND, kind, best.writing, best.tokens, best.caution, size,
                      leak if any(t.silent for t in best.tokens) else None, silent_ids, read_seconds,
                      time.perf_counter() - began, false_use, best.meets(false_use))


def states_bytes(
    kind: str, records: Sequence[TokenSnippets], model: FrozenModel, expansion: Expansion, *,
    prefix_ids: Sequence[int] = (), places_per_token: int = 200,
) -> int:
    """Return how much memory the states take that `make_output_rows` reads, on the host; 0 if it reads none."""
    if kind not in ("fit", "none") or model.head_bias_V is not None:
        return 0
    skipped = max(0, len(prefix_ids) - 1)
    sizes = (len(window) - skipped for windows in _windows(records, expansion, prefix_ids, places_per_token)
             for window in windows)
    return sum(sizes) * model.head_VD.shape[1] * model.dtype.itemsize


def work_bytes(kind: str, num_tokens: int, model: FrozenModel) -> int:
    """Return about how much memory `make_output_rows` works in, beside the states; 0 if it reads no text."""
    if kind not in ("fit", "none") or model.head_bias_V is not None:
        return 0
    rows, width = model.head_VD.shape
    inner = model.step_bytes() // (PROBE_POSITIONS * (model.num_layers + 2))  # of one position and layer
    reading = WINDOW_POSITIONS * (2 * model.past_bytes() + inner) + 3 * HEAD_PLACES * rows * 4
    # Scores with their gradients; rows, whitened rows, gradients and Adam's two; the second moments and their root.
    fitting = 4 * (3 * BATCH * num_tokens + 6 * num_tokens * width + 3 * width**2) if kind == "fit" else 0
    return max(reading, fitting)


def _windows(
    records: Sequence[TokenSnippets], expansion: Expansion, prefix_ids: Sequence[int], places_per_token: int
) -> tuple[list[Ids], list[Ids]]:
    """Choose snippets of each token, in base ids: those to fit to, and those to judge by.

    The rows are fitted together, so no text is on both sides, whichever tokens it was chosen for. Without any snippet
    the runs themselves are text: enough to find rows that are silent.
    """
    prefix = np.asarray(prefix_ids, np.int64)
    chosen: list[Ids] = []
    owned: list[range] = []
    for record in records:
        begin, wanted = len(chosen), places_per_token
        for ids in expansion.unmerge_batch(record.snippets):
            chosen.append(ids)
            wanted -= len(ids)
            if wanted <= 0:
                break
        owned.append(range(begin, len(chosen)))
    texts = text_numbers(chosen)
    judging = _judging_texts(owned, texts)
    sides: dict[bool, list[Ids]] = {False: [], True: []}
    for ids, text in zip(chosen, texts, strict=True):
        sides[text in judging].append(np.concatenate((prefix, ids)))
    train, held_out = sides[False], sides[True]
    runs = [np.asarray([*prefix_ids, *record.new_token.run], np.int64) for record in records]
    return train or runs, held_out


def _judging_texts(owned: Sequence[range], texts: Sequence[int]) -> set[int]:
    """Choose the texts to judge by: for each token some of its own, rather those that few windows are of.

    Args:
        owned: The windows of each token.
        texts: Which text each window is.
    """
    count, train, held = Counter(texts), set[int](), set[int]()
    for windows in owned:
        order = sorted(windows, key=lambda at: (count[texts[at]], (at - windows.start) % HELD_OUT_EVERY != 1, at))
        free = [at for at in order if texts[at] not in train and 2 * count[texts[at]] <= len(texts)]
        wanted = -(-(len(windows) - 1) // HELD_OUT_EVERY)  # of a single one none
        held |= {texts[at] for at in free[:wanted]}
        train |= {texts[at] for at in windows} - held
    return held


def _read(
    model: FrozenModel, windows: Sequence[Ids], tree: RunTree, first_new_id: int, first: int, progress: Progress
) -> Places:
    order = sorted(range(len(windows)), key=lambda s: len(windows[s]))  # of one length as far as possible: no padding
    skipped = max(0, first - 1)
    hidden_PD, done = torch.empty(0, dtype=model.dtype), 0
    parts: list[Places] = []
    with progress("reading what the base writes", sum(map(len, windows)), "positions") as task:
        for at in range(0, len(order), WINDOWS_AT_ONCE):
            some = [windows[s] for s in order[at : at + WINDOWS_AT_ONCE]]
            part = find_places(model, some, tree, first_new_id=first_new_id, first=skipped)
            # States are nearly all there is: they go to their place at once, so that they are never there twice.
            if not parts:
                size = sum(len(window) - skipped for window in windows)
                hidden_PD = part.hidden_PD.new_empty(size, part.hidden_PD.shape[1])
            hidden_PD[done : done + len(part)] = part.hidden_PD
            done += len(part)
            parts.append(replace(part, hidden_PD=part.hidden_PD.new_empty(0)))
            task.advance(sum(map(len, some)))
    return replace(concatenate(parts), hidden_PD=hidden_PD)


@dataclass(frozen=True)
class _Try:
    """Rows after one training, as they would be shipped, and what they do on held-out places."""

    rows_ND: torch.Tensor
    tokens: tuple[TokenWriting, ...]
    writing: Writing
    caution: float

    def meets(self, false_use: float) -> bool:
        return self.writing.false_use <= false_use

    def worth(self, false_use: float) -> tuple[bool, float]:
        """Return what tries are compared by: within the bound their adoption, outside how near to it they are."""
        meets = self.meets(false_use)
        return meets, (self.writing.adoption or 0.0) if meets else -self.writing.false_use


@dataclass(frozen=True)
class _Judge:
    """Held-out places, and what is done with rows before they are shipped: too long ones shortened, bad ones silent."""

    records: Sequence[TokenSnippets]
    places: Places
    lengths_N: torch.Tensor
    silent_D: torch.Tensor
    longest: float
    logit_map: LogitMap

    def __call__(self, rows_ND: torch.Tensor, caution: float) -> _Try:
        shipped_ND = rows_ND * (self.longest / rows_ND.norm(dim=1, keepdim=True).clamp(min=self.longest))
        tokens = _reports(self.records, self.places, find_uses(self.places, shipped_ND, self.logit_map))
        shipped_ND[[i for i, token in enumerate(tokens) if token.silent is not None]] = self.silent_D.to(rows_ND)
        uses = find_uses(self.places, shipped_ND, self.logit_map)
        return _Try(shipped_ND.cpu(), tokens, measure_writing(self.places, uses, self.lengths_N), caution)


def _fit(fit: OutputFit, judge: _Judge, false_use: float, progress: Progress) -> _Try:
    """Fit rows, and return those with the best adoption among the ones that are wrong at no more places than allowed.

    Every training is measured. If none of the planned ones keeps the bound, caution grows until one does, or
    until there were enough.
    """
    with progress("fitting output rows", fit.steps(FIRST_EPOCHS) + TRIES * fit.steps(TRY_EPOCHS), "steps") as bar:
        fit.train(FIRST_EPOCHS, 1.0, bar.advance)
        last = best = judge(fit.rows_ND, 1.0)
        for _ in range(TRIES):
            bar.note(f"wrong at {last.writing.false_use:.2%} of places")
            caution = min(MOST_CAUTION, max(1.0, last.caution * _more_caution(last, false_use)))
            last = _train_on(fit, judge, caution, bar)
            best = max(best, last, key=lambda made: made.worth(false_use))
        bar.note(f"wrong at {best.writing.false_use:.2%} of places")
    for _ in range(RAISES):
        if best.meets(false_use):
            break
        with progress("fitting output rows with more caution", fit.steps(TRY_EPOCHS), "steps") as bar:
            last = _train_on(fit, judge, last.caution * max(RAISE, _more_caution(last, false_use)), bar)
            best = max(best, last, key=lambda made: made.worth(false_use))
            bar.note(f"wrong at {last.writing.false_use:.2%} of places")
    return best


def _train_on(fit: OutputFit, judge: _Judge, caution: float, bar: Task) -> _Try:
    """Train rows on from where they are, and judge them."""
    fit.train(TRY_EPOCHS, caution, bar.advance)
    return judge(fit.rows_ND, caution)


def _more_caution(made: _Try, false_use: float) -> float:
    """Return by which factor the caution should change so that wrong use comes to lie just below the bound."""
    return float((max(made.writing.false_use, 1e-6) / (AIM * false_use)) ** (1 / POWER))


def _reports(records: Sequence[TokenSnippets], judged: Places, uses: Uses) -> tuple[TokenWriting, ...]:
    right_N, wrong_N = per_token(uses, len(records))
    deserved_N = torch.bincount(judged.token_R[judged.greedy_R], minlength=len(records))
    return tuple(
        TokenWriting(record.new_token.token, deserved, right, wrong, _why_silent(deserved, right, wrong))
        for record, deserved, right, wrong in zip(
            records, deserved_N.tolist(), right_N.tolist(), wrong_N.tolist(), strict=True))


def _why_silent(deserved: int, right: int, wrong: int) -> str | None:
    """Say why a token should not be written: on held-out places it is more often wrong than right, or never right."""
    if not right:
        return f"never right at {deserved} held-out places that deserve it" if deserved else UNJUDGED
    return f"wrong at {wrong} held-out places, right at {right}" if wrong > right else None


def silent_row(
    head_VD: torch.Tensor, parts: Sequence[Places], first_new_id: int, logit_map: LogitMap,
    usable_V: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float, tuple[int, ...]]:
    """Return a row that is never on top: the mean of the two base rows that are least likely at their likeliest place.

    Its logit is the mean of theirs at every state that there is, so the larger of the two is above it: greedy decoding
    cannot choose it. And no sample draws it more often than the likelier of two tokens that the base never writes.
    A row of zeros has neither bound, and a row that is fitted to be unlikely is likely at states it was not fitted to.

    Args:
        head_VD: The base's output rows.
        parts: Places at which to look, some in each part.
        first_new_id: Id of the first new token (U).
        logit_map: From products to logits, as the model class does it.
        usable_V: Which of these may be chosen; None finds those in use (`rows_in_use`).

    Returns:
        The row (D,), float32, the largest probability that it has at one of the places, and the ids of the two rows.

    Raises:
        UsageError: If there is no row to choose.
    """
    num_rows = min(first_new_id, len(head_VD))  # the last ids may have no row
    usable_V = rows_in_use(head_VD, num_rows) if usable_V is None else usable_V
    if not bool(usable_V.any()):
        raise UsageError(f"all {num_rows:,} output rows of the model are zero, so that none can keep a token from "
                         "being written; the weights are damaged, or were never trained")
    size, begin = sum(map(len, parts)), 0
    at = torch.linspace(0, size - 1, min(size, SILENCE_PLACES), dtype=torch.float64).long()
    worst_V = torch.full((num_rows,), -math.inf, dtype=torch.float32)
    for part in parts:
        own = at[(at >= begin) & (at < begin + len(part))] - begin
        begin += len(part)
        for some in own.split(ROWS_AT_ONCE) if len(own) else ():
            logits_CV = part.hidden_PD[some].to(head_VD) @ head_VD[:num_rows].T  # the head in its own dtype: no copy
            share_CV = logit_map(logits_CV.float()).cpu() - part.normaliser_P[some, None]
            worst_V = torch.maximum(worst_V, share_CV.amax(0))
    worst_V[~usable_V] = math.inf
    first, *others = worst_V.topk(min(3, int(usable_V.sum())), largest=False).indices.tolist()
    for least in ([first, others[0]], [first, others[-1]], [first]) if others else ([first],):
        row_D = head_VD[least].float().mean(0).cpu()
        if bool(row_D.to(head_VD.dtype).any()):  # not each other's opposite
            break
    leak = max(float((logit_map(hidden_CD.float() @ row_D) - normaliser_C).max())
               for part in parts for hidden_CD, normaliser_C in zip(
                   part.hidden_PD.split(8_192), part.normaliser_P.split(8_192), strict=True))
    return row_D, math.exp(leak), tuple(least)
