"""The stage: mean-of-pieces rows, training in groups, and the quality gate."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vocabext.checkpoint import Rows, resolve_model, save_rows
from vocabext.config import DistillConfig
from vocabext.distill.engine import FORWARD_SNIPPETS, Fit, fit_rows
from vocabext.distill.examples import build_examples
from vocabext.distill.silence import Background, sample_background
from vocabext.errors import UsageError
from vocabext.expansion import Expansion
from vocabext.manifest import file_sha256
from vocabext.model import FrozenModel, load_model
from vocabext.progress import Progress, no_progress
from vocabext.records import TokenSnippets, check_output, read_jsonl
from vocabext.rows import mean_rows
from vocabext.tokenizer import check_made_for, extend, load_tokenizer

# One snippet in this many is held out (at least one): it judges the row that the others made.
HELD_OUT_EVERY = 8
# Snippets from which the places are sampled where rows should not be written.
BACKGROUND_SNIPPETS = 256
# Fewer snippets than this cannot be split into training and held-out ones.
MIN_SNIPPETS = 2
# Positions that one training step should have at least, to keep the matrix units busy.
POSITIONS_PER_STEP = 6_000


@dataclass(frozen=True)
class TokenReport:
    """How one row was made.

    Attributes:
        token: The text of the token.
        snippets: How many snippets it had.
        start_error: Held-out relative squared error of the mean-of-pieces row; None if not measured.
        end_error: The same for the row that is shipped.
        norm: Its Euclidean norm.
        method: `distill`, or `mean` where training had nothing to train on or made nothing better.
    """

    token: str
    snippets: int
    start_error: float | None
    end_error: float | None
    norm: float
    method: str

    @property
    def ratio(self) -> float:
        """Error as a share of the mean-of-pieces error: 1 where nothing was gained or measured."""
        return self.end_error / self.start_error if self.start_error and self.end_error is not None else 1.0


@dataclass(frozen=True)
class DistillResult:
    """Rows for all tokens, in their order, and a report for each.

    Attributes:
        input_ND: Input rows, float32.
        reports: One per token.
        layer: The layer whose states were matched; 0 for `mean`.
        taken_nats: How much all new rows together lower the log probability of base tokens where the base
            predicts, on average; None where the output rows are others (untied), or nothing was trained.
        taken_nats_start: The same for the mean-of-pieces rows.
    """

    input_ND: torch.Tensor
    reports: tuple[TokenReport, ...]
    layer: int
    taken_nats: float | None = None
    taken_nats_start: float | None = None

    @property
    def relative_error(self) -> float | None:
        """Held-out error over all trained tokens as a share of the mean-of-pieces error."""
        start = sum(r.start_error for r in self.reports if r.start_error is not None)
        end = sum(r.end_error for r in self.reports if r.end_error is not None)
        return end / start if start else None

    def summary(self) -> dict[str, object]:
        """Return what a reader wants to know, as JSON-ready values."""
        return {"tokens": len(self.reports), "trained": sum(r.method == "distill" for r in self.reports),
                "layer": self.layer, "relative_error": self.relative_error,
                "taken_nats_start": self.taken_nats_start, "taken_nats": self.taken_nats,
                "per_token": [asdict(report) for report in self.reports]}  # fmt: skip


def distill_file(
    path: Path, model: str, output: Path, config: DistillConfig, *, force: bool = False,
    trust_remote_code: bool = False, progress: Progress = no_progress,
) -> DistillResult:  # fmt: skip
    """Read snippets, make the rows of their tokens, and write them to `output`.

    Args:
        path: The artifact of `collect`; with `--method mean` that of `mine` will do.
        model: The base model: folder or hub id.
        output: The rows file to write.
        config: Method and options.
        force: Replace `output`.
        trust_remote_code: Run code that comes with the model.
        progress: Where to report.

    Raises:
        UsageError: If the file is damaged or empty, or was made for a model with other token ids.
    """
    check_output(output, force=force)
    accepted = ("snippets", "candidates") if config.method == "mean" else ("snippets",)
    header, rows = read_jsonl(path, accepted)
    try:
        records = [TokenSnippets.from_json(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {error}); make it again") from None
    if not records:
        raise UsageError(f"{path} holds no tokens; mine again")
    folder = resolve_model(model)
    base = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    check_made_for(header, base, path)
    extend(base, [record.new_token for record in records])  # refuses tokens of another tokenizer
    frozen = load_model(folder, device=config.device, dtype=config.dtype, trust_remote_code=trust_remote_code)
    result = distill(records, frozen, config, num_used_ids=base.num_used_ids, prefix_ids=base.prefix_ids,
                     progress=progress)  # fmt: skip
    made_from = {"model": model, "num_used_ids": base.num_used_ids, "hidden_size": frozen.embedding_VD.shape[1],
                 "tokenizer_sha256": file_sha256(folder / "tokenizer.json")}  # fmt: skip
    save_rows(output, [record.new_token for record in records], Rows(result.input_ND), {
        "base": made_from, "method": config.method, "options": {**header.get("options", {}), **asdict(config)},
        "layer": result.layer, "relative_error": result.relative_error,
        "taken_nats_start": result.taken_nats_start, "taken_nats": result.taken_nats,
        "per_token": [asdict(report) for report in result.reports],
    })  # fmt: skip
    return result


def distill(
    records: Sequence[TokenSnippets], model: FrozenModel, config: DistillConfig, *, num_used_ids: int,
    prefix_ids: Sequence[int] = (), progress: Progress = no_progress,
) -> DistillResult:  # fmt: skip
    """Make the input rows of all new tokens.

    Args:
        records: The tokens with their snippets, in token-id order.
        model: The frozen base model.
        config: Method and options.
        num_used_ids: Id of the first new token.
        prefix_ids: What the tokenizer puts in front of a prompt.
        progress: Where to report.
    """
    tokens = [record.new_token for record in records]
    rows_ND = mean_rows(model.embedding_VD.cpu(), tokens)
    if config.method == "mean":
        reports = [_report(record, row_D, None) for record, row_D in zip(records, rows_ND, strict=True)]
        return DistillResult(rows_ND, tuple(reports), 0)
    layer = model.layer_number(config.target_layer)
    expansion = Expansion(tokens, num_used_ids)
    rate = config.learning_rate * float(model.embedding_VD[:num_used_ids].float().square().mean().sqrt())
    errors: dict[int, tuple[float, float]] = {}
    background = _background(records, expansion, model, config, prefix_ids) if model.tied else None
    taken_start = None if background is None else float(background.taken(rows_ND.to(model.device)).sum())
    with progress("distilling", len(records), "tokens") as task:
        for group in _groups(records, config):
            fit = _fit_group(group, records, expansion, rows_ND[group], model, config, layer, rate, prefix_ids,
                             background)  # fmt: skip
            rows_ND[group] = fit.rows_GD
            pairs = zip(fit.start_error_G.tolist(), fit.end_error_G.tolist(), strict=True)
            errors.update(zip(group, pairs, strict=True))
            task.advance(len(group))
            start, end = (sum(pair[side] for pair in errors.values()) for side in (0, 1))
            task.note(f"error {end / start:.0%} of the start")
    reports = [_report(record, rows_ND[i], errors.get(i)) for i, record in enumerate(records)]
    taken = None if background is None else float(background.taken(rows_ND.to(model.device)).sum())
    return DistillResult(rows_ND, tuple(reports), layer, taken, taken_start)


def _background(
    records: Sequence[TokenSnippets], expansion: Expansion, model: FrozenModel, config: DistillConfig,
    prefix_ids: Sequence[int],
) -> Background | None:  # fmt: skip
    """Sample places from one snippet of each of some tokens, spread over all of them."""
    having = [i for i, record in enumerate(records) if record.snippets]
    if not having:
        return None
    some = having[:: max(1, len(having) // BACKGROUND_SNIPPETS)]
    first = [replace(records[i], snippets=records[i].snippets[:1], positions=records[i].positions[:1]) for i in some]
    groups = [build_examples(first[at : at + FORWARD_SNIPPETS], expansion, some[at : at + FORWARD_SNIPPETS],
                             prefix_ids=prefix_ids) for at in range(0, len(some), FORWARD_SNIPPETS)]  # fmt: skip
    return sample_background(model, groups, expansion.first_new_id, torch.Generator().manual_seed(config.seed))


def _groups(records: Sequence[TokenSnippets], config: DistillConfig) -> list[list[int]]:
    """Split the tokens that can be trained into groups that share their steps.

    Tokens with about the same number of snippets go together, so that nobody waits for the others.
    """
    trainable = [i for i, r in enumerate(records) if len(r.snippets) >= MIN_SNIPPETS]
    trainable.sort(key=lambda i: -len(records[i].snippets))
    lengths = [len(s) for r in records for s in r.snippets]
    typical = max(1, sum(lengths) // max(1, len(lengths)))
    size = max(1, round(POSITIONS_PER_STEP / (typical * config.batch_snippets)))
    return [trainable[at : at + size] for at in range(0, len(trainable), size)]


def _fit_group(
    group: list[int], records: Sequence[TokenSnippets], expansion: Expansion, start_GD: torch.Tensor,
    model: FrozenModel, config: DistillConfig, layer: int, rate: float, prefix_ids: Sequence[int],
    background: Background | None,
) -> Fit:  # fmt: skip
    parts = [_split(records[i]) for i in group]
    train, held_out = (build_examples([part[side] for part in parts], expansion, group, prefix_ids=prefix_ids)
                       for side in (0, 1))  # fmt: skip
    return fit_rows(
        model, train, held_out, start_GD, first_new_id=expansion.first_new_id, layer=layer, epochs=config.epochs,
        learning_rate=rate, batch_snippets=config.batch_snippets,
        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + group[0]),
        # All tokens are in one softmax, so each answers for as much as all would take if they were like it.
        background=background, silence=config.silence * len(records),
    )  # fmt: skip


def _split(record: TokenSnippets) -> tuple[TokenSnippets, TokenSnippets]:
    """Set some snippets aside; returns what to train on and what to judge by."""
    size = len(record.snippets)
    held = set(range(0, size, HELD_OUT_EVERY))
    sides = ([i for i in range(size) if i not in held], sorted(held))
    train, held_out = (
        replace(record, snippets=tuple(record.snippets[i] for i in side),
                positions=tuple(record.positions[i] for i in side))
        for side in sides
    )  # fmt: skip
    return train, held_out


def _report(record: TokenSnippets, row_D: torch.Tensor, errors: tuple[float, float] | None) -> TokenReport:
    start, end = errors or (None, None)
    improved = start is not None and end is not None and end < start
    return TokenReport(record.new_token.token, len(record.snippets), start, end, float(row_D.norm()),
                       "distill" if improved else "mean")  # fmt: skip
