"""From snippets to output rows: what to read, how cautious to be, and which tokens stay silent.

Shape suffixes: N new tokens, D hidden size, P places.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from vocabext.config import DistillConfig
from vocabext.expansion import Expansion, Ids
from vocabext.model import FrozenModel
from vocabext.progress import Progress, no_progress
from vocabext.records import TokenSnippets
from vocabext.rows import mean_rows
from vocabext.vocabulary import MAX_NORM_RATIO
from vocabext.writing.fit import Fit, Task, capped, longest_runs
from vocabext.writing.measure import Uses, Writing, find_uses, measure_writing, per_token
from vocabext.writing.places import Places, concatenate, find_places
from vocabext.writing.runs import RunTree

# One window in this many judges rows that the others made.
HELD_OUT_EVERY = 8
# Windows that are read between two reports of progress.
WINDOWS_AT_ONCE = 256
# Passes over the places: at first, for each try of another caution, and at the end.
FIRST_EPOCHS, TRY_EPOCHS = 6.0, 3.0
TRIES = 3
# How wrong use falls as caution grows: with this power of it, roughly. And the highest caution that is tried.
POWER, MOST_CAUTION = 0.9, 64.0
# A row is at most so many times as long as the longest base row in use: longer ones are loud wherever a state is
# unusual. Less than what `verify` allows, as rows are rounded to the dtype of the model afterwards.
LONGEST = 0.97 * MAX_NORM_RATIO
# What stands for zero: a row of exact zeros cannot be told from one that was forgotten.
ALMOST_ZERO = 1e-4
# Places at which the least likely base rows are looked for.
SILENCE_PLACES = 4_096
ROWS_AT_ONCE = 256


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

    def summary(self) -> dict[str, object]:
        """Return what a reader wants to know, as JSON-ready values."""
        return {"kind": self.kind, "held_out": None if self.held_out is None else self.held_out.to_json(),
                "written": sum(t.silent is None for t in self.tokens) if self.tokens else None,
                "silent": [asdict(t) for t in self.tokens if t.silent is not None], "caution": self.caution,
                "places": self.places, "leak": self.leak, "silent_ids": list(self.silent_ids),
                "read_seconds": self.read_seconds, "fit_seconds": self.fit_seconds}  # fmt: skip


def writes_with_own_rows(model: FrozenModel, config: DistillConfig) -> bool:
    """Tell whether new tokens get output rows of their own.

    The mean of pieces as input rows is the quick baseline, made without text: nothing is fitted then. And some
    engines multiply with the embedding whatever a checkpoint says: there a tied model keeps its one matrix.
    """
    from vocabext.patch_plan import TIED_IN_VLLM

    tied_for_good = model.tied and type(model.model).__name__ in TIED_IN_VLLM
    return config.method == "distill" and config.output_rows != "input" and not tied_for_good


def make_output_rows(
    kind: str, records: Sequence[TokenSnippets], model: FrozenModel, expansion: Expansion, *,
    prefix_ids: Sequence[int] = (), places_per_token: int = 200, false_use: float = 0.01, seed: int = 0,
    progress: Progress = no_progress,
) -> OutputRows:  # fmt: skip
    """Make the output rows of all new tokens.

    Args:
        kind: `fit`, `mean`, `zero`, or `none` for rows that stay silent.
        records: The tokens that get a row, with their snippets.
        model: The frozen base model.
        expansion: The new tokens that the snippets are written in; at least those of `records`.
        prefix_ids: What the tokenizer puts in front of a prompt.
        places_per_token: How much of the snippets is read, in base ids per token.
        false_use: Share of held-out places at which a new token may be on top where base writes something else.
        seed: Of every choice.
        progress: Where to report.
    """
    tokens = [record.new_token for record in records]
    mean_ND = mean_rows(model.head_VD, tokens).cpu()
    if kind in ("mean", "zero"):
        return OutputRows(mean_ND if kind == "mean" else ALMOST_ZERO * mean_ND, kind)
    if getattr(model.model.get_output_embeddings(), "bias", None) is not None:
        # A head with a bias is not fitted to. `patch` gives `none` a bias that no logit comes up to.
        return OutputRows(ALMOST_ZERO * mean_ND, "none", leak=0.0)
    began = time.perf_counter()
    train, held_out = _windows(records, expansion, prefix_ids, places_per_token)
    tree = RunTree.of(tokens)
    places, judged = (_read(model, windows, tree, expansion.first_new_id, len(prefix_ids), progress)
                      for windows in (train, held_out))  # fmt: skip
    read_seconds = time.perf_counter() - began
    if not len(places) or not len(judged):  # nothing is known: a row between base rows is never on top
        return OutputRows(mean_ND, "mean")
    began = time.perf_counter()
    lengths_N = torch.tensor([len(token.run) for token in tokens])
    head_VD = model.head_VD
    silent_D, leak, silent_ids = silent_row(head_VD, concatenate([places, judged]), expansion.first_new_id,
                                            model.logit_cap)  # fmt: skip
    if kind == "none":
        return OutputRows(silent_D.expand(len(tokens), -1).clone(), kind, None, (), None, len(places) + len(judged),
                          leak, silent_ids, read_seconds, time.perf_counter() - began)  # fmt: skip
    task = Task(places, longest_runs(places, lengths_N), model.logit_cap)
    rows_ND, caution = _fit(task, judged, len(tokens), false_use, model, seed, progress)
    longest = LONGEST * float(torch.linalg.vector_norm(head_VD[:expansion.first_new_id], dim=1,
                                                       dtype=torch.float32).max())
    rows_ND *= (longest / rows_ND.norm(dim=1, keepdim=True).clamp(min=longest))
    uses = find_uses(judged, rows_ND, model.logit_cap)
    reports = _reports(records, judged, uses)
    rows_ND[[i for i, report in enumerate(reports) if report.silent is not None]] = silent_D
    final = measure_writing(judged, find_uses(judged, rows_ND, model.logit_cap), lengths_N)
    return OutputRows(rows_ND, kind, final, reports, caution, len(places) + len(judged),
                      leak if any(r.silent for r in reports) else None, silent_ids, read_seconds,
                      time.perf_counter() - began)  # fmt: skip


def _windows(
    records: Sequence[TokenSnippets], expansion: Expansion, prefix_ids: Sequence[int], places_per_token: int
) -> tuple[list[Ids], list[Ids]]:
    """Choose snippets of each token, in base ids: those to fit to, and those to judge by."""
    prefix = np.asarray(prefix_ids, np.int64)
    train: list[Ids] = []
    held_out: list[Ids] = []
    for record in records:
        wanted = places_per_token
        for number, ids in enumerate(expansion.unmerge_batch(record.snippets)):
            (held_out if number % HELD_OUT_EVERY == 1 else train).append(np.concatenate((prefix, ids)))
            wanted -= len(ids)
            if wanted <= 0:
                break
    return train, held_out


def _read(
    model: FrozenModel, windows: Sequence[Ids], tree: RunTree, num_base: int, first: int, progress: Progress
) -> Places:
    order = sorted(range(len(windows)), key=lambda s: len(windows[s]))  # of one length as far as possible: no padding
    parts = []
    with progress("reading what the base writes", len(windows), "snippets") as task:
        for at in range(0, len(order), WINDOWS_AT_ONCE):
            some = [windows[s] for s in order[at : at + WINDOWS_AT_ONCE]]
            parts.append(find_places(model, some, tree, num_base=num_base, first=max(0, first - 1)))
            task.advance(len(some))
    return concatenate(parts)


def _fit(
    task: Task, judged: Places, num_tokens: int, false_use: float, model: FrozenModel, seed: int, progress: Progress
) -> tuple[torch.Tensor, float]:
    """Fit rows, with as little caution as keeps wrong use on held-out places below the bound."""
    fit, caution = Fit(task, num_tokens, model.device, seed), 1.0
    with progress("fitting output rows", fit.steps(FIRST_EPOCHS) + TRIES * fit.steps(TRY_EPOCHS), "steps") as bar:
        fit.train(FIRST_EPOCHS, caution, bar.advance)
        for _ in range(TRIES):
            uses = find_uses(judged, fit.rows_ND, task.cap)
            wrong = int((uses.on_top_P & ~uses.right_P).sum()) / len(judged)
            factor = (max(wrong, 1e-6) / false_use) ** (1 / POWER)
            caution = min(MOST_CAUTION, max(1.0, caution * factor))
            bar.note(f"wrong at {wrong:.2%} of places")
            fit.train(TRY_EPOCHS, caution, bar.advance)
    return fit.rows_ND.cpu(), caution


def _reports(records: Sequence[TokenSnippets], judged: Places, uses: Uses) -> tuple[TokenWriting, ...]:
    right_N, wrong_N = per_token(uses, len(records))
    deserved_N = torch.bincount(judged.token_R[judged.greedy_R], minlength=len(records))
    return tuple(
        TokenWriting(record.new_token.token, deserved, right, wrong, _why_silent(deserved, right, wrong))
        for record, deserved, right, wrong in zip(
            records, deserved_N.tolist(), right_N.tolist(), wrong_N.tolist(), strict=True))  # fmt: skip


def _why_silent(deserved: int, right: int, wrong: int) -> str | None:
    """Say why a token should not be written: on held-out places it is more often wrong than right, or never right."""
    if not right:
        return f"never right at {deserved} held-out places that deserve it" if deserved else "no place to judge it by"
    return f"wrong at {wrong} held-out places, right at {right}" if wrong > right else None


def silent_row(
    head_VD: torch.Tensor, places: Places, num_base: int, cap: float | None = None
) -> tuple[torch.Tensor, float, tuple[int, ...]]:  # fmt: skip
    """Return a row that is never on top: the mean of the two base rows that are least likely at their likeliest place.

    Its logit is the mean of theirs at every state that there is, so the larger of the two is above it: greedy decoding
    cannot choose it. And no sample draws it more often than the likelier of two tokens that the base never writes.
    A row of zeros has neither bound, and a row that is fitted to be unlikely is likely at states it was not fitted to.

    Args:
        head_VD: The base's output rows.
        places: Places at which to look.
        num_base: How many of the rows are in use.
        cap: Bound that the model puts on logits.

    Returns:
        The row (D,), float32, the largest probability that it has at one of the places, and the ids of the two rows.
    """
    at = torch.linspace(0, len(places) - 1, min(len(places), SILENCE_PLACES)).long()
    worst_V = torch.full((num_base,), -math.inf)
    for some in at.split(ROWS_AT_ONCE):
        logits_CV = places.hidden_PD[some].to(head_VD.device).float() @ head_VD[:num_base].float().T
        share_CV = capped(logits_CV, cap).cpu() - places.normaliser_P[some, None]
        worst_V = torch.maximum(worst_V, share_CV.amax(0))
    least = worst_V.topk(min(2, num_base), largest=False).indices
    row_D = head_VD[least.to(head_VD.device)].float().mean(0).cpu()
    leak = max(float((capped(part_CD.float() @ row_D, cap) - normaliser_C).max()) for part_CD, normaliser_C in zip(
        places.hidden_PD.split(8_192), places.normaliser_P.split(8_192), strict=True))  # fmt: skip
    return row_D, math.exp(leak), tuple(least.tolist())
