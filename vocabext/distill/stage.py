"""The stage: mean-of-pieces rows, training in groups, and the quality gate."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import compress, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from vocabext.checkpoint.folder import Rows, resolve_model, save_rows
from vocabext.checkpoint.manifest import base_record
from vocabext.checkpoint.rows import mean_rows, row_norms, rows_in_use
from vocabext.distill.heap import give_back_large_blocks
from vocabext.distill.input_rows.contexts import sharing_is_exact
from vocabext.distill.input_rows.engine import GroupFit, Objective, fit_rows
from vocabext.distill.input_rows.examples import Examples, build_examples, check_snippets
from vocabext.distill.input_rows.memory import GIB, MemoryPlan, plan_memory
from vocabext.distill.input_rows.report import TokenReport, left_out_reasons, nearest_rows
from vocabext.distill.input_rows.resume import FinishedGroups, model_facts, work_digest
from vocabext.distill.input_rows.sharing import share_texts
from vocabext.distill.input_rows.silence import Background, sample_background
from vocabext.distill.output_rows.stage import (
    OutputChoice,
    OutputRows,
    choose_output_rows,
    make_output_rows,
    states_bytes,
    work_bytes,
)
from vocabext.distill.overlap import text_numbers
from vocabext.errors import UsageError
from vocabext.files.atomic import check_output
from vocabext.files.folders import locked
from vocabext.files.jsonl import read_tokens
from vocabext.model.frozen import FrozenModel, check_runs_on_rows, load_model
from vocabext.model.support import check_patchable, check_runs
from vocabext.options import DistillConfig
from vocabext.progress import Progress, Task, no_progress
from vocabext.tokenizer import BaseTokenizer, check_made_for, extend, load_base
from vocabext.tokens import Expansion, TokenSnippets

# One snippet in this many is held out (at least one): it judges the row that the others made. Snippets of one text
# (`overlap.py`) are on one side, so that no text judges what it has trained.
HELD_OUT_EVERY = 8
# Snippets from which the places are sampled where rows should not be written, and how many of them at once.
BACKGROUND_SNIPPETS = 256
BACKGROUND_AT_ONCE = 128
# Fewer different snippets than this are not trained on. Where there are more, but all of one text, all train, the token
# stops early, and nothing judges its row.
MIN_SNIPPETS = 2
# Positions that one training step should have at least, to keep the matrix units busy.
POSITIONS_PER_STEP = {"cpu": 2_000, "cuda": 16_000}
# Tokens that a group should have at least: the more there are, the fewer texts they need (`sharing.py`), and the better
# they learn together which directions matter (`clocks.py`).
TOKENS_PER_GROUP = 512
# Positions that go through the model at once while gradients are computed: a bound for long snippets.
POSITIONS_AT_ONCE = {"cpu": 2_000, "cuda": 16_000}
# The first round shows so many snippets of a token, each once; every further round twice as many.
FIRST_SNIPPETS = 8
# Snippets whose length is looked at to see whether sharing is exact.
PROBE_TOKENS = 32
# Counts changes of this package after which finished groups of an older one do not fit to new ones.
WORK_VERSION = 3
# Options that no group depends on: they decide what becomes of finished input rows, and about the output rows.
AFTERWARDS = ("output_rows", "writing_places", "false_use", "leave_out")


@dataclass(frozen=True)
class DistillResult:
    """Rows for all tokens, in their order, and a report for each.

    Attributes:
        input_ND: Input rows, float32; of the tokens that are left out, too.
        reports: One per token.
        layer: The layer whose states were matched; 0 for `mean`.
        taken_nats: How much all new rows together lower the log probability of base tokens where the base
            predicts, on average; None where the output rows are others (untied), or nothing was trained.
        taken_nats_start: The same for the mean-of-pieces rows.
        memory: What the work needed; None for `mean`.
        output: Output rows of the tokens that are shipped; None where they are the input rows, or the base's choice.
        choice: Why these output rows; None where nobody chose.
    """

    input_ND: torch.Tensor
    reports: tuple[TokenReport, ...]
    layer: int
    taken_nats: float | None = None
    taken_nats_start: float | None = None
    memory: MemoryPlan | None = None
    output: OutputRows | None = None
    choice: OutputChoice | None = None

    @property
    def rows(self) -> Rows:
        """The rows that are shipped."""
        return Rows(self.input_ND[self.kept], None if self.output is None else self.output.output_ND)

    @property
    def relative_error(self) -> float | None:
        """Held-out error over all trained tokens as a share of the mean-of-pieces error."""
        start = sum(r.start_error for r in self.reports if r.start_error is not None)
        end = sum(r.end_error for r in self.reports if r.end_error is not None)
        return end / start if start else None

    @property
    def kept(self) -> list[int]:
        """The tokens that are shipped."""
        return [i for i, report in enumerate(self.reports) if report.left_out is None]

    def summary(self) -> dict[str, object]:
        """Return what a reader wants to know, as JSON-ready values."""
        return {"tokens": len(self.kept), "trained": sum(r.method == "distill" for r in self.reports),
                "layer": self.layer, "relative_error": self.relative_error,
                "taken_nats_start": self.taken_nats_start, "taken_nats": self.taken_nats,
                "memory": None if self.memory is None else asdict(self.memory),
                "left_out": [asdict(r) for r in self.reports if r.left_out is not None],
                "writing": self._writing(),
                "per_token": [{**asdict(self.reports[i]), **facts} for i, facts in zip(
                    self.kept, self._writing_facts(), strict=True)]}

    def _writing(self) -> dict[str, object] | None:
        """Return what is said about the writing of all tokens."""
        if self.output is not None:
            return {**self.output.summary(), "why": None if self.choice is None else self.choice.why}
        return None if self.choice is None else asdict(self.choice)

    def _writing_facts(self) -> list[dict[str, object]]:
        """Return what is said about the writing of each shipped token."""
        if self.output is None or not self.output.tokens:
            return [{} for _ in self.kept]
        return [{"writes": t.silent is None, "writing": asdict(t)} for t in self.output.tokens]


def distill_file(
    path: Path, model: str, output: Path, config: DistillConfig, *, force: bool = False,
    trust_remote_code: bool = False, progress: Progress = no_progress, say: Callable[[str], None] = lambda _: None,
) -> DistillResult:
    """Read snippets, make the rows of their tokens, and write them to `output`.

    Args:
        path: The artifact of `collect`; with `--method mean` that of `mine` will do.
        model: As for `make_rows`.
        output: The rows file to write.
        config: As for `make_rows`.
        force: Replace `output`.
        trust_remote_code: As for `make_rows`.
        progress: As for `make_rows`.
        say: As for `make_rows`.

    Raises:
        UsageError: If the file is damaged or empty; and what `make_rows` raises.
    """
    check_output(output, force=force)
    header, records = read_records(path, config)
    result, _ = make_rows(header, records, model, config, output=output, source=path,
                          trust_remote_code=trust_remote_code, progress=progress, say=say)
    return result


def read_records(path: Path, config: DistillConfig) -> tuple[dict[str, Any], list[TokenSnippets]]:
    """Read what rows are made from: header and records of snippets, or of candidates where no text is needed."""
    accepted = ("snippets", "candidates") if config.method == "mean" else ("snippets",)
    return read_tokens(path, accepted, TokenSnippets.from_json)


def make_rows(
    header: Mapping[str, Any], records: Sequence[TokenSnippets], model: str, config: DistillConfig, *,
    output: Path | None = None, source: object = "the tokens", trust_remote_code: bool = False,
    progress: Progress = no_progress, say: Callable[[str], None] = lambda _: None,
) -> tuple[DistillResult, dict[str, Any]]:
    """Make the input rows of new tokens, and the output rows where the model has some of their own.

    With an output, finished groups of tokens are kept in a folder beside it until it is written: the same call goes
    on after them if it was interrupted, with the same result.

    Args:
        header: The header of the snippets (or candidates).
        records: The tokens with their snippets, in token-id order.
        model: The base model: folder or hub id.
        config: Method and options.
        output: The rows file to write, replaced if it is there; None writes none.
        source: What messages call the records.
        trust_remote_code: Run code that comes with the model.
        progress: Where to report.
        say: Told what a user should know, a line at a time.

    Returns:
        The rows with their reports, and the header of a rows file.

    Raises:
        UsageError: If the records were made for a model with other token ids, or some of them are missing; or if the
            model cannot be run on rows, or cannot have the output rows that were asked for.
    """
    folder = resolve_model(model)
    base = load_base(folder, trust_remote_code=trust_remote_code)
    # Before the work: what `patch` would refuse afterwards.
    checkpoint = check_patchable(folder, base.first_new_id, num_new=len(records), trust_remote_code=trust_remote_code)
    names = checkpoint.names
    if config.method != "mean":
        check_runs(folder, trust_remote_code=trust_remote_code)
    choice = choose_output_rows(config, architecture=names.architecture, tied=names.tied,
                                biased=names.head_bias is not None)
    made_from = base_record(folder, names, model=model, first_new_id=base.first_new_id)
    check_made_for(header, base, source)
    extend(base, [record.new_token for record in records])  # refuses tokens of another tokenizer
    check_snippets(records, base.first_new_id, source)
    if choice.why is not None:
        say(choice.why)
    with _groups_folder(output) as beside:
        if config.method == "mean":  # which takes no more of the model than its rows
            embedding_VD = checkpoint.read(checkpoint.vocab_tensors[0])
            result = _mean(records, embedding_VD, config, first_new_id=base.first_new_id,
                           textless_ids=base.textless_ids,
                           parts=base.scheme.parts([record.new_token for record in records]))
        else:
            frozen = load_model(folder, device=config.device, dtype=config.dtype, trust_remote_code=trust_remote_code,
                                max_memory=config.max_memory, offload_folder=beside / "offloaded")
            result = _distill_both(records, frozen, config, choice, base, beside=beside, progress=progress, say=say)
        result = replace(result, choice=choice)
        rows_header = {
            "base": made_from, "method": config.method, "options": {**header["options"], **asdict(config)},
            **{key: value for key, value in result.summary().items() if key not in ("tokens", "trained")},
        }
        if output is not None:
            save_rows(output, [records[i].new_token for i in result.kept], result.rows, rows_header)
    return result, rows_header


@contextmanager
def _groups_folder(output: Path | None) -> Iterator[Path]:
    """Name the folder of finished groups; it stays for the next call if one with an output is interrupted."""
    if output is None:
        with TemporaryDirectory(prefix="vocabext-") as scratch:
            yield Path(scratch) / "groups"
        return
    beside = output.with_name(f".{output.name}.vocabext-groups")
    with locked(output):  # another process with this output would delete the groups that this one has finished
        yield beside
        FinishedGroups(beside, "").remove()


def _distill_both(
    records: Sequence[TokenSnippets], frozen: FrozenModel, config: DistillConfig, choice: OutputChoice,
    base: BaseTokenizer, *, beside: Path, progress: Progress, say: Callable[[str], None],
) -> DistillResult:
    """Make the input rows of all new tokens, and the output rows where the model has some of their own."""
    own_head, tokens = choice.kind != "input", [record.new_token for record in records]
    # Input rows that are nothing else need not be kept silent.
    reading = replace(config, silence=0.0) if own_head else config
    expansion = Expansion(tokens, base.first_new_id)
    writing_bytes = work_bytes(choice.kind, len(records), frozen) + states_bytes(
        choice.kind, records, frozen, expansion, prefix_ids=base.prefix_ids, places_per_token=config.writing_places)
    result = distill(records, frozen, reading, first_new_id=base.first_new_id, prefix_ids=base.prefix_ids,
                     progress=progress, finished_folder=beside, writing_bytes=writing_bytes,
                     textless_ids=base.textless_ids, parts=base.scheme.parts(tokens))
    if unjudged := sum(report.start_error is None for report in result.reports):
        say(f"tokens without two different texts (one snippet, or windows of one text): {unjudged:,}; nothing is left "
            "to judge their rows by, and their errors are not known; collect from more text, or pass "
            "--generate-missing")
    if not own_head:
        return result
    made = make_output_rows(
        choice.kind, [records[i] for i in result.kept], frozen, expansion, prefix_ids=base.prefix_ids,
        places_per_token=config.writing_places, false_use=config.false_use, seed=config.seed, progress=progress,
        textless_ids=base.textless_ids)
    if made.held_out is not None and not made.bound_met:
        say(f"new tokens are written wrongly at {made.held_out.false_use:.2%} of held-out places, above the "
            f"{config.false_use:.2%} of --false-use; collect more snippets, or pass --output-rows none")
    return replace(result, output=made, taken_nats=None, taken_nats_start=None)


def _mean(
    records: Sequence[TokenSnippets], embedding_VD: torch.Tensor, config: DistillConfig, *, first_new_id: int,
    textless_ids: Collection[int], parts: Sequence[Sequence[int]],
) -> DistillResult:
    """Make the input rows that are the mean of each token's run."""
    rows_ND = mean_rows(embedding_VD, [record.new_token for record in records]).cpu()
    usable_V = rows_in_use(embedding_VD, first_new_id, textless_ids)
    reports = _reports(records, rows_ND, rows_ND, {}, {}, config, embedding_VD, usable_V, parts)
    return DistillResult(rows_ND, reports, 0)


def distill(
    records: Sequence[TokenSnippets], model: FrozenModel, config: DistillConfig, *, first_new_id: int,
    prefix_ids: Sequence[int] = (), progress: Progress = no_progress, finished_folder: Path | None = None,
    writing_bytes: int = 0, parts: Sequence[Sequence[int]] = (), textless_ids: Collection[int] = (),
) -> DistillResult:
    """Make the input rows of all new tokens.

    Args:
        records: The tokens with their snippets, in token-id order.
        model: The frozen base model.
        config: Method and options.
        first_new_id: Id of the first new token.
        prefix_ids: What the tokenizer puts in front of a prompt.
        progress: Where to report.
        finished_folder: Where finished groups are kept, to go on after an interruption; the caller removes it.
        writing_bytes: What the output rows need afterwards, to be stated with the rest.
        parts: For each token the indices of those that it is merged from; they stay as long as it does.
        textless_ids: Base ids that no text has; their rows are no measure for new ones.
    """
    if config.method == "mean":
        return _mean(records, model.embedding_VD, config, first_new_id=first_new_id, textless_ids=textless_ids,
                     parts=parts)
    give_back_large_blocks()
    embedding_VD = model.embedding_VD
    rows_ND = mean_rows(embedding_VD, [record.new_token for record in records]).cpu()
    usable_V = rows_in_use(embedding_VD, first_new_id, textless_ids)
    start_ND = rows_ND.clone()
    norms_V = row_norms(embedding_VD[:first_new_id])[usable_V]
    scale = float((norms_V.square().mean() / embedding_VD.shape[1]).sqrt())
    work = _Distillation(records, model, config, first_new_id, tuple(prefix_ids), finished_folder, scale)
    taken_start = work.taken(rows_ND)
    memory = replace(work.memory, writing_bytes=writing_bytes)
    with progress(memory.describe()):
        pass  # stated before the work starts
    errors, shown = work.run(rows_ND, progress)
    reports = _reports(records, rows_ND, start_ND, errors, shown, config, embedding_VD, usable_V, parts)
    return DistillResult(rows_ND, reports, work.layer, work.taken(rows_ND), taken_start, memory)


def _group_name(number: int) -> str:
    return f"{number:08d}"


class _Planned:
    """A task of which a part is planned: what is left of this part can be skipped at its end."""

    def __init__(self, task: Task, amount: int) -> None:
        self.left, self._task, self.note = amount, task, task.note

    def advance(self, amount: int = 1, /) -> None:
        amount = min(amount, self.left)
        self.left -= amount
        self._task.advance(amount)

    def skip(self, amount: int, /) -> None:
        self.left -= amount
        self._task.skip(amount)


class _Distillation:
    """Everything that the groups of tokens share."""

    def __init__(
        self, records: Sequence[TokenSnippets], model: FrozenModel, config: DistillConfig, first_new_id: int,
        prefix_ids: Sequence[int], finished_folder: Path | None, scale: float,
    ) -> None:
        self.records, self.model, self.config, self.prefix_ids = records, model, config, prefix_ids
        check_runs_on_rows(model.model.config)
        self.layer = model.layer_number(config.target_layer)
        self.expansion = Expansion([record.new_token for record in records], first_new_id)
        if (longest := self._longest_text()) > model.max_positions:
            raise UsageError(f"the longest snippet has {longest} base ids, and the model takes {model.max_positions} "
                             "at most; collect again with a smaller --window")
        embedding_VD = model.embedding_VD
        self.rate = config.learning_rate * scale  # root mean square of the elements of base rows
        self.last_piece_ND = embedding_VD[[record.new_token.run[-1] for record in records]].cpu().float()
        self.trainable = [i for i, record in enumerate(records) if self._different(record) >= MIN_SNIPPETS]
        # Tokens with about the same number of snippets go together, so that nobody waits for the others.
        self.trainable.sort(key=lambda i: -len(records[i].snippets))
        self.background = self._background() if model.tied else None
        # `patch` gives tokens that share their rows with the head the mean of their pieces' bias.
        self.bias_N = None if model.head_bias_V is None else mean_rows(model.head_bias_V, self.expansion.tokens)
        self._divided: dict[tuple[int, ...], list[list[TokenSnippets]]] = {}
        self.memory = self._plan()
        self.finished = None
        if finished_folder is not None:
            options = {name: value for name, value in asdict(config).items() if name not in AFTERWARDS}
            facts = {"version": WORK_VERSION, "options": options, "model": model_facts(model),
                     "group": self.memory.group, "keep_past": self.memory.keep_past,
                     "prefix_ids": list(prefix_ids), "first": first_new_id}
            self.finished = FinishedGroups(finished_folder, work_digest(records, facts))

    def taken(self, rows_ND: torch.Tensor) -> float | None:
        """Return how many nats all rows together take from the base tokens."""
        if self.background is None:
            return None
        return float(self.background.taken(rows_ND.to(self.model.device), self.bias_N).sum())

    def run(
        self, rows_ND: torch.Tensor, progress: Progress
    ) -> tuple[dict[int, tuple[float, float]], dict[int, int]]:
        """Train all groups; `rows_ND` is changed in place.

        Returns:
            For each token that is judged its held-out errors (start, end), and for each that was trained how many
            snippets it was shown.
        """
        errors: dict[int, tuple[float, float]] = {}
        shown: dict[int, int] = {}
        groups = self._groups(self.memory.group)
        known = [None if self.finished is None else self.finished.load(_group_name(n)) for n in range(len(groups))]
        plans = [self._passes(group) if fit is None else 0 for group, fit in zip(groups, known, strict=True)]
        with progress("distilling", sum(plans), "snippets") as task:
            for number, group in enumerate(groups):
                planned = _Planned(task, plans[number])
                fit = known[number] or self._group(group, _group_name(number), rows_ND[group], planned)
                task.skip(planned.left)
                rows_ND[group] = fit.rows_GD
                pairs = zip(fit.start_error_G.tolist(), fit.end_error_G.tolist(), strict=True)
                errors.update(compress(zip(group, pairs, strict=True), self._judged(group)))
                shown.update(zip(group, fit.shown_G.tolist(), strict=True))
                start, end = (sum(pair[side] for pair in errors.values()) for side in (0, 1))
                task.note(f"error {end / start:.0%} of the start" if start else "nothing to judge by")
        return errors, shown

    def _passes(self, group: Sequence[int]) -> int:
        """Return how many snippets of a group go through the model if no token stops early.

        The teacher reads each. Held-out ones judge the one or two starts and every round.
        """
        held_out, *added = (sum(len(record.snippets) for record in part) for part in self._parts(group))
        rounds = self._rounds(group)
        judgements = (1 if self._loud else 2) + len(rounds)
        return sum(added) + held_out * (1 + judgements) + len(group) * sum(shows for _, shows in rounds)

    @property
    def _loud(self) -> bool:
        """Whether a row that is an output row as well begins elsewhere than at its last piece.

        The row of the last piece is often nearer than the mean: it stands where the new token stands. But where the
        matrices are tied it is also loud: an output row that is written wherever that piece is.
        """
        return self.model.tied and self.config.silence > 0

    def _group(self, group: list[int], name: str, start_GD: torch.Tensor, task: Task) -> GroupFit:
        held_out, *train = (self._lay_out(part, group) if any(record.snippets for record in part) else None
                            for part in self._parts(group))
        generators = [torch.Generator().manual_seed(self.config.seed * 1_000_003 + token) for token in group]
        last_GD = None if self._loud else self.last_piece_ND[group]
        objective = self._objective(group)
        fit = fit_rows(self.model, train, held_out, start_GD, objective, generators, last_GD, task)
        if self.finished is not None:
            self.finished.save(name, fit)
        return fit

    def _objective(self, group: Sequence[int]) -> Objective:
        return Objective(
            layer=self.layer, rounds=self._rounds(group), learning_rate=self.rate,
            positions=POSITIONS_AT_ONCE[self.model.device.type], keep_past=self.memory.keep_past,
            background=self.background,
            # All tokens are in one softmax, so each answers for as much as all would take if they were like it.
            silence=self.config.silence * len(self.records),
            bias_G=None if self.bias_N is None else self.bias_N[group],
        )

    def _groups(self, size: int) -> list[list[int]]:
        return [self.trainable[at : at + size] for at in range(0, len(self.trainable), size)]

    def _rounds(self, group: Sequence[int]) -> list[tuple[int, int]]:
        most = max(len(self.records[i].snippets) for i in group)
        return _rounds(most - -(-most // HELD_OUT_EVERY), self.config.epochs, self.config.rounds)

    def _judged(self, group: Sequence[int]) -> list[bool]:
        """Tell which tokens have held-out snippets."""
        return [bool(record.snippets) for record in self._parts(group)[0]]

    def _texts(self, record: TokenSnippets) -> list[int]:
        """Return which text each snippet of a token is."""
        return text_numbers(self.expansion.unmerge_batch(record.snippets))

    def _different(self, record: TokenSnippets) -> int:
        """Return how many different snippets a token has, however they are merged."""
        return len({ids.tobytes() for ids in self.expansion.unmerge_batch(record.snippets)})

    def _shared(self, group: Sequence[int], first: int) -> list[tuple[TokenSnippets, list[int]]]:
        """Return what the tokens of a group learn from, and which text each snippet is.

        A token that would get snippets of one text only keeps its own, where these are of more.
        """
        own = [self.records[i] for i in group]
        shared = share_texts(own, [self.expansion.first_new_id + i for i in group], first)
        found = []
        for record, other in zip(own, shared, strict=True):
            texts = self._texts(other)
            if len(set(texts)) > 1 or len(set(own_texts := self._texts(record))) < 2:
                found.append((other, texts))
            else:
                found.append((record, own_texts))
        return found

    def _parts(self, group: Sequence[int]) -> list[list[TokenSnippets]]:
        """Return the held-out snippets of a group, and what each round adds to the training ones.

        Many of its tokens have them in common (`sharing.py`).
        """
        first = FIRST_SNIPPETS + -(-FIRST_SNIPPETS // (HELD_OUT_EVERY - 1))  # those of the first round, and held out
        if tuple(group) not in self._divided:  # the plan of the memory has asked already
            split = [_split(record, texts) for record, texts in self._shared(group, first)]
            added = [[_slice(train, low, high) for train, _ in split] for low, high in _bounds(self._rounds(group))]
            self._divided[tuple(group)] = [[held_out for _, held_out in split], *added]
        return self._divided[tuple(group)]

    def _lay_out(self, records: Sequence[TokenSnippets], tokens: Sequence[int]) -> Examples:
        return build_examples(records, self.expansion, tokens, prefix_ids=self.prefix_ids, reach=self.config.reach)

    def _plan(self) -> MemoryPlan:
        """State the memory, and choose the size of groups, from the longest snippets there are."""
        snippets = [len(record.snippets) for record in self.records]
        longest = max((len(ids) for record in self.records for ids in record.snippets), default=1)
        before = self._longest_text()
        some = self.trainable[:: max(1, len(self.trainable) // PROBE_TOKENS)]
        exact = False
        if some:
            probe = self._lay_out([self.records[i] for i in some], some)
            exact = sharing_is_exact(self.model, probe, self.layer)
        width = longest if self.config.reach is None else min(longest, self.config.reach + 1)
        wanted = POSITIONS_PER_STEP[self.model.device.type] // width
        budget = None if self.config.cache_gib is None else int(self.config.cache_gib * GIB)
        return plan_memory(self.model, tokens=len(self.records), snippets=max(snippets), before=before, width=width,
                           layer=self.layer, positions=POSITIONS_AT_ONCE[self.model.device.type],
                           wanted_group=max(TOKENS_PER_GROUP, wanted), budget_bytes=budget, exact=exact,
                           kept_positions=self._kept_positions)

    def _longest_text(self) -> int:
        """Return how many base ids the longest snippet has, with what stands in front of it."""
        rows = [ids for record in self.records for ids in record.snippets]
        if not rows:
            return len(self.prefix_ids) + 1
        lengths = self.expansion.run_lengths(np.concatenate([np.asarray(ids, np.int64) for ids in rows]))
        starts = np.cumsum([0, *map(len, rows[:-1])])
        return len(self.prefix_ids) + int(np.add.reduceat(lengths, starts).max())

    def _kept_positions(self, size: int) -> tuple[int, int]:
        """Return how many positions stand before tokens, in the texts of a group and in one of them, at most.

        Texts are padded to the longest that a part of a group has.
        """
        kept, longest = 0, 0
        for group in self._groups(size):
            parts = [self._most_before(part, group) for part in self._parts(group)]
            kept = max(kept, sum(texts * before for texts, before in parts))
            longest = max(longest, *(before for _, before in parts))
        return kept, longest

    def _most_before(self, part: Sequence[TokenSnippets], group: Sequence[int]) -> tuple[int, int]:
        """Return how many texts some snippets are, and how many base ids stand before the token in one at most."""
        starts = [(ids, ids.index(self.expansion.first_new_id + i))
                  for i, record in zip(group, part, strict=True) for ids in record.snippets]
        before = max((int(self.expansion.run_lengths(ids[:at]).sum()) for ids, at in starts), default=0)
        return len({ids for ids, _ in starts}), len(self.prefix_ids) + before

    def _background(self) -> Background | None:
        """Sample places from one snippet of each of some tokens, spread over all of them."""
        having = [i for i, record in enumerate(self.records) if record.snippets]
        if not having:
            return None
        some = having[:: max(1, len(having) // BACKGROUND_SNIPPETS)]
        first = [_slice(self.records[i], 0, 1) for i in some]
        groups = [self._lay_out(first[at : at + BACKGROUND_AT_ONCE], some[at : at + BACKGROUND_AT_ONCE])
                  for at in range(0, len(some), BACKGROUND_AT_ONCE)]
        generator = torch.Generator().manual_seed(self.config.seed)
        return sample_background(self.model, groups, self.expansion.first_new_id, generator)


def _rounds(snippets: int, epochs: int, most: int | None = None) -> list[tuple[int, int]]:
    """Return for each round how many snippets it uses, and how often it shows one.

    Rounds double. All together show every snippet `epochs` times, or fewer where a token stops early, or where
    there may be no more than `most` rounds.
    """
    left, rounds, shows = snippets * epochs, list[tuple[int, int]](), min(snippets, FIRST_SNIPPETS)
    while left:
        if left < 1.5 * shows:  # what would be left for another round is not worth one
            shows = left
        rounds.append((snippets if shows == left else min(shows, snippets), shows))
        left -= shows
        shows *= 2
    return rounds[:most]


def _bounds(rounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return which snippets each round adds."""
    uses = [0, *(use for use, _ in rounds)]
    return list(pairwise(uses))


def _split(record: TokenSnippets, texts: Sequence[int]) -> tuple[TokenSnippets, TokenSnippets]:
    """Set some snippets aside, whole texts only; returns what to train on and what to judge by.

    Args:
        record: The snippets.
        texts: Which text each of them is. If all are one, all train.
    """
    size, held = len(record.snippets), set[int]()
    wanted, count = -(-size // HELD_OUT_EVERY), Counter(texts)
    if len(count) > 1:
        for at, text in enumerate(texts):
            taken = sum(count[other] for other in held)
            if text not in held and at >= HELD_OUT_EVERY * taken and count[text] <= wanted - taken:
                held.add(text)
        held = held or {min(count, key=lambda text: count[text])}
    sides = [[i for i in range(size) if (texts[i] in held) == side] for side in (False, True)]
    return _only(record, sides[0]), _only(record, sides[1])


def _slice(record: TokenSnippets, low: int, high: int) -> TokenSnippets:
    return _only(record, range(len(record.snippets))[low:high])


def _only(record: TokenSnippets, at: Sequence[int]) -> TokenSnippets:
    return replace(record, snippets=tuple(record.snippets[i] for i in at),
                   positions=tuple(record.positions[i] for i in at))


def _reports(
    records: Sequence[TokenSnippets], rows_ND: torch.Tensor, start_ND: torch.Tensor,
    errors: Mapping[int, tuple[float, float]], shown: Mapping[int, int], config: DistillConfig,
    embedding_VD: torch.Tensor, usable_V: torch.Tensor, parts: Sequence[Sequence[int]],
) -> tuple[TokenReport, ...]:
    base_VD = embedding_VD[: len(usable_V)]
    typical = float(row_norms(base_VD)[usable_V].median())
    reasons = left_out_reasons([errors.get(i) for i in range(len(records))], config.leave_out, parts)
    nearest = nearest_rows(rows_ND, base_VD, usable_V)
    reports = []
    for i, record in enumerate(records):
        start, end = errors.get(i, (None, None))
        unchanged = torch.equal(rows_ND[i], start_ND[i])
        copied = torch.equal(rows_ND[i], base_VD[record.new_token.run[-1]].cpu().float())
        norm = float(rows_ND[i].norm())
        reports.append(TokenReport(
            record.new_token.token, len(record.snippets), start, end, norm,
            "mean" if unchanged else "piece" if copied else "distill",
            norm / max(typical, 1e-12), nearest[i], shown.get(i, 0), reasons[i]))
    return tuple(reports)
