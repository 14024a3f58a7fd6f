"""Distill the same tokens with the reference's training step and with ours; print time, error and memory of both.

    python benchmarks/distill_reference.py [--model DIR --corpus FILE --heldout FILE] [-o result.json]
    python benchmarks/distill_reference.py --scale 5000
    python benchmarks/distill_reference.py --random-model 1b

The first form needs nothing but $VOCABEXT_ASSETS (../shared/assets): 500 tokens, 25 snippets each, on biomed-13m.
Both run in this process, one after the other, on the same model, tokens, snippets and threads; ours pays for
whatever it compiles. Neither is charged for loading, tokenizing or finding snippets. Then both are measured in
float32 on held-out documents with all new tokens merged: mean squared error of last-layer hidden states, share of
the gap recovered, bits per byte (quality.py). The work that matrix products take is counted in another run.

`--scale N` distills N tokens with ours alone and shows time and memory part by part. `--random-model` takes random
weights and random text: time and memory only. reference_step.py says how the reference was read.
"""

import argparse
import math
import os
import sys
import time
from ast import literal_eval
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import MIB, Clock, PeakMemory, describe, matrix_peak, release_memory
from quality import Quality, measure
from reference_step import ReferenceConfig, Snapshot, lay_out, run_reference, schedule
from transformers.utils import logging as transformers_logging
from work import BodyShape, Floor, WorkCounter, floor_of, reference_work

from vocabext.collect import collect
from vocabext.config import CollectConfig, DistillConfig, MineConfig
from vocabext.corpus import read_documents
from vocabext.distill import DistillResult, distill
from vocabext.errors import UsageError
from vocabext.evaluate import RowSet
from vocabext.expansion import Expansion
from vocabext.mine import mine
from vocabext.model import FrozenModel, load_model, pick_device, pick_dtype
from vocabext.pipeline import is_held_out
from vocabext.progress import Progress, no_progress
from vocabext.records import Document, NewToken, TokenSnippets, write_json
from vocabext.rows import mean_rows
from vocabext.tokenizer import BaseTokenizer, extend, load_tokenizer

ASSETS = Path(os.environ.get("VOCABEXT_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))
# What ours is run with beside the defaults, cheapest first: a number of snippets, and options of DistillConfig.
BUDGETS = ("snippets=6,epochs=1", "epochs=1", "epochs=16")
DEFAULTS = "defaults"
SCALE_PARTS = 10
TIMES = ("seconds", "CPU seconds", "times faster")
MEMORY = ("peak MiB", "beyond the start")
# Tokens of the run in which work is counted; it stands for all.
COUNTED_TOKENS = 100
# Positions of one product at the model's own shape, for the peak that its layers could reach.
SHAPE_POSITIONS = 4096
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1},
    # The shape of Llama 3.2 1B.
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What both distill.

    Attributes:
        source: Folder of the model, or the name of a random one.
        records: The tokens with their snippets.
        expansion: The tokens.
        prefix_ids: What stands in front of every snippet.
        device: Where everything runs.
    """

    source: str | Path
    records: list[TokenSnippets]
    expansion: Expansion
    prefix_ids: tuple[int, ...]
    device: torch.device

    @property
    def num_snippets(self) -> int:
        """How many snippets there are."""
        return sum(len(record.snippets) for record in self.records)

    def load(self, dtype: str) -> FrozenModel:
        """Load the model anew."""
        if isinstance(self.source, Path):
            return load_model(self.source, device=str(self.device), dtype=dtype)
        return random_model(self.source, self.device, pick_dtype(dtype, self.device))


@dataclass(frozen=True)
class Run:
    """Rows that somebody made, and what they cost.

    Attributes:
        name: Who, and with which budget.
        seconds: Wall time.
        cpu_seconds: Processor time of all threads.
        dtype: What the model computed in.
        input_ND: Input rows.
        output_ND: Output rows; None where the input rows are that too.
        memory: Most memory in use, and how much of it was in use before the model was loaded; None if not watched.
        result: What ours reports.
    """

    name: str
    seconds: float
    cpu_seconds: float
    dtype: str
    input_ND: torch.Tensor
    output_ND: torch.Tensor | None = None
    memory: tuple[int, int] | None = None
    result: DistillResult | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    arguments = _parse(argv)
    device = pick_device(arguments.device)
    transformers_logging.disable_progress_bar()
    if arguments.random_model:
        found = compare_random(arguments, device)
    elif arguments.scale:
        found = scale(arguments, device)
    else:
        found = compare(arguments, device)
    if arguments.output:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        write_json(arguments.output, {"options": options, "machine": describe(device), **found})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora = ASSETS / "corpora"
    parser.add_argument("--model", type=Path, default=ASSETS / "models" / "biomed-13m", help="folder of the base model")
    parser.add_argument("--corpus", type=Path, help="text to mine and distill from (default: MedQuAD)")
    parser.add_argument("--heldout", type=Path, help="other text to measure on (default: documents out of --corpus)")
    parser.add_argument("--tokens", type=int, default=500, help="how many new tokens to mine, if there are as many")
    parser.add_argument("--snippets", type=int, default=25, help="snippets per token")
    parser.add_argument("--min-count", type=int, default=10, help="how often a token must occur in the mining text")
    parser.add_argument("--max-bytes", type=int, default=100_000, help="held-out text to read, in bytes")
    parser.add_argument("--ours", nargs="*", default=BUDGETS, metavar="KEY=VALUE,...",
                        help="further budgets of ours, snippets=N and options of distill; those that would take longer "
                             "than the reference are left out (default: %(default)s)")
    parser.add_argument("--merged", choices=("all", "own"), default="all",
                        help="which new tokens the reference merges in a snippet")
    parser.add_argument("--autocast", action="store_true", help="let the reference multiply in bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scale", type=int, metavar="N", help="distill N tokens with ours, part by part")
    parser.add_argument("--random-model", choices=tuple(RANDOM_MODELS), help="random weights; time and memory only")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args(argv)
    if arguments.corpus is None:
        arguments.corpus, arguments.heldout = (corpora / f"medquad{part}.jsonl.gz" for part in ("", ".heldout"))
    if not arguments.random_model:
        for path in filter(None, (arguments.model, arguments.corpus, arguments.heldout)):
            if not path.exists():
                parser.error(f"{path} does not exist; give --model and --corpus, or set VOCABEXT_ASSETS")
    for budget in arguments.ours:
        try:
            _budget(budget)
        except (TypeError, UsageError, ValueError) as error:
            parser.error(f"--ours {budget!r} is no list of KEY=VALUE: {error}")
    return arguments


def _budget(text: str) -> tuple[int | None, DistillConfig]:
    """Read `snippets=6,epochs=1`: how many snippets at most, and the options."""
    pairs = dict(part.split("=", 1) for part in text.split(",") if part)
    snippets = pairs.pop("snippets", None)
    defaults = {field.name: field.default for field in fields(DistillConfig)}
    unknown = sorted(set(pairs) - set(defaults))
    if unknown:
        raise ValueError(f"there is no option {', '.join(unknown)}; there are snippets, {', '.join(defaults)}")
    options: dict[str, Any] = {key: value if isinstance(defaults[key], str) else _literal(value)
                               for key, value in pairs.items()}  # fmt: skip
    return (None if snippets is None else int(snippets)), DistillConfig(**options)


def _literal(text: str) -> Any:
    """Read a number, true, false or none; anything else is a string."""
    try:
        return literal_eval(text.title() if text.isalpha() else text)
    except (SyntaxError, ValueError):
        return text


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run both, measure both, print the tables."""
    base = load_tokenizer(arguments.model)
    with note("mining and collecting"):
        records, heldout = prepare(arguments, base, arguments.tokens)
    tokens = [record.new_token for record in records]
    expanded = extend(base, tokens)
    task = Task(arguments.model, records, expanded.expansion, tuple(base.prefix_ids), device)
    with note("the reference"):
        snapshots, memory = time_reference(task, _reference_config(arguments))
    dtype = "bfloat16" if arguments.autocast else "float32"
    references = [_reference_run(s, dtype) for s in snapshots]
    references[-1] = replace(references[-1], memory=memory)
    runs: list[Run] = []
    # The defaults first: compiling and warming up is theirs to pay.
    for budget in ("", *arguments.ours):
        if runs and (expected := _expected_seconds(budget, runs[0], arguments.snippets)) > references[-1].seconds:
            write_note(f"ours, {budget}: left out, would take about {expected:.0f} s, longer than the reference")
            continue
        with note(f"ours, {budget or DEFAULTS}"):
            runs.append(time_ours(task, budget))
    with note("measuring on held-out text"):
        release_memory(device)
        model = task.load("float32")
        sets = row_sets([*references, *runs], model, tokens)
        qualities = measure(heldout, model, base, expanded, sets, arguments.max_bytes)
        del model
    with note("counting the work"):
        work = work_of(task, references[-1], runs[0], _reference_config(arguments))
    reference, ours = references[-1], runs[0]
    write(f"{len(tokens)} tokens, {task.num_snippets:,} snippets, {arguments.model.name}, {device}, "
          f"{torch.get_num_threads()} threads\n")
    _print_comparison(qualities, reference, ours)
    _print_curve(qualities, [*references, *runs])
    _print_work(work)
    return {"tokens": len(tokens), "snippets": task.num_snippets, "work": work,
            "quality": {name: asdict(q) for name, q in qualities.items()},
            "runs": [_run_json(run) for run in (*references, *runs)]}  # fmt: skip


def prepare(
    arguments: argparse.Namespace, base: BaseTokenizer, num_tokens: int
) -> tuple[list[TokenSnippets], list[Document]]:
    """Mine tokens and collect their snippets; returns these and the held-out documents."""
    documents = list(read_documents([str(arguments.corpus)]))
    if arguments.heldout:
        mining, heldout = documents, list(read_documents([str(arguments.heldout)]))
    else:
        mining = [document for document in documents if not is_held_out(document)]
        heldout = [document for document in documents if is_held_out(document)]
    config = MineConfig(budget=num_tokens, min_count=arguments.min_count)
    tokens = mine(mining, base, config, at_most=True).tokens
    collecting = CollectConfig(snippets=arguments.snippets, min_snippets=min(8, arguments.snippets))
    return collect(mining, base, tokens, collecting), heldout


def time_reference(task: Task, config: ReferenceConfig) -> tuple[list[Snapshot], tuple[int, int]]:
    """Run the reference; returns its rows at several times, and the memory in use at most and before."""
    pairs = lay_out(task.records, task.expansion, task.prefix_ids, config.merged)
    with PeakMemory(task.device) as memory:
        model = task.load("float32")
        snapshots = run_reference(pairs, model, task.expansion, config)
        del model
    return snapshots, (memory.peak_bytes, memory.before_bytes)


def time_ours(task: Task, budget: str) -> Run:
    """Run our engine with a budget, `""` for its defaults."""
    num_snippets, config = _budget(budget)
    records = [_capped(record, num_snippets) for record in task.records]
    with PeakMemory(task.device) as memory:
        model = task.load(config.dtype)
        clock = Clock(task.device)
        result = _distill(task, records, model, config)
        seconds, cpu_seconds = clock.read()
        dtype = str(model.dtype).removeprefix("torch.")
        del model
    output_ND: torch.Tensor | None = getattr(result, "output_ND", None)
    return Run(f"ours, {budget or DEFAULTS}", seconds, cpu_seconds, dtype, result.input_ND, output_ND,
               (memory.peak_bytes, memory.before_bytes), result)  # fmt: skip


def _expected_seconds(budget: str, defaults: Run, num_snippets: int) -> float:
    """Guess how long a budget takes from how long the defaults took."""
    snippets, config = _budget(budget)
    share = min(1.0, (num_snippets if snippets is None else snippets) / num_snippets)
    return defaults.seconds * share * config.epochs / DistillConfig().epochs


def _distill(task: Task, records: Sequence[TokenSnippets], model: FrozenModel, config: DistillConfig,
             progress: Progress = no_progress) -> DistillResult:  # fmt: skip
    return distill(records, model, config, num_used_ids=task.expansion.first_new_id, prefix_ids=task.prefix_ids,
                   progress=progress)  # fmt: skip


def _reference_config(arguments: argparse.Namespace) -> ReferenceConfig:
    return ReferenceConfig(merged=arguments.merged, autocast=arguments.autocast)


def _reference_run(snapshot: Snapshot, dtype: str) -> Run:
    return Run(f"reference, {snapshot.share:.3g} epoch", snapshot.seconds, snapshot.cpu_seconds, dtype,
               snapshot.input_ND, snapshot.output_ND)  # fmt: skip


def _capped(record: TokenSnippets, num_snippets: int | None) -> TokenSnippets:
    return replace(record, snippets=record.snippets[:num_snippets], positions=record.positions[:num_snippets])


def row_sets(runs: Sequence[Run], model: FrozenModel, tokens: Sequence[NewToken]) -> list[RowSet]:
    """Return the mean of pieces, and then the rows of every run.

    Raises:
        SystemExit: If a run left tokens out: then its error would be about another text.
    """
    mean = RowSet("mean", mean_rows(model.embedding_VD, tokens), mean_rows(model.head_VD, tokens))
    sets = [mean]
    for run in runs:
        if len(run.input_ND) != len(tokens):
            raise SystemExit(f"{run.name} made {len(run.input_ND)} rows for {len(tokens)} tokens; each needs one, or "
                             "the errors are not about the same text")
        # Where output rows are a matrix of their own and a run makes none, they are the mean of the pieces.
        output_ND = run.output_ND if run.output_ND is not None else (run.input_ND if model.tied else mean.output_ND)
        sets.append(RowSet(run.name, run.input_ND, output_ND))
    return sets


# -- work -------------------------------------------------------------------------------------------------------------


def work_of(task: Task, reference: Run, ours: Run, config: ReferenceConfig) -> dict[str, Any]:
    """Count what both did and the least that ours needed, and measure what the machine could do."""
    assert ours.result is not None
    counter = count_ours(task, ours.result)
    model = task.load("float32")
    shape, tied = BodyShape.of(model), model.tied
    del model
    batches = schedule(lay_out(task.records, task.expansion, task.prefix_ids, config.merged), config)
    rows = max(shape.rows, task.expansion.end_id)
    body, head = reference_work(shape, batches, rows, tied=tied)
    num_prefix, options = len(task.prefix_ids), DistillConfig()
    least = floor_of(shape, task.records, task.expansion, num_prefix, layer=ours.result.layer,
                     shown=[report.shown for report in ours.result.reports], epochs=options.epochs,
                     reach=options.reach)  # fmt: skip
    once = floor_of(shape, task.records, task.expansion, num_prefix, layer=shape.layers,
                    shown=[len(record.snippets) for record in task.records], epochs=1)  # fmt: skip
    other, by_part = sum(counter.flops.values()) - counter.body, sorted(counter.flops.items())
    return {"reference": _work_json(task, shape, reference, body, head, once),
            "ours": _work_json(task, shape, ours, counter.body, other, least),
            "ours_by_part": {f"{part} {way}": count for (part, way), count in by_part}}  # fmt: skip


def count_ours(task: Task, timed: DistillResult) -> WorkCounter:
    """Run ours with its defaults once more, uncompiled and off the clock, and count what it does.

    A sample of the tokens stands for all: the others keep their ids, but come without snippets.

    Args:
        task: What was distilled.
        timed: What came of the run with all tokens.
    """
    every = -(-len(task.records) // COUNTED_TOKENS)
    records = [record if i % every == 0 else _capped(record, 0) for i, record in enumerate(task.records)]
    model = task.load(DistillConfig().dtype)
    counter = WorkCounter(model)
    torch.compiler.set_stance("force_eager")
    try:
        with counter:
            result = _distill(task, records, model, DistillConfig())
    finally:
        torch.compiler.set_stance("default")
    counter.scale(_shown(timed) / max(1, _shown(result)))
    return counter


def _shown(result: DistillResult) -> int:
    """Return how many snippets the tokens were shown in all."""
    return sum(report.shown for report in result.reports)


def _work_json(task: Task, shape: BodyShape, run: Run, body: int, rest: int, floor: Floor) -> dict[str, Any]:
    dtype = getattr(torch, run.dtype)
    own = matrix_peak(dtype, task.device, (SHAPE_POSITIONS, shape.hidden, shape.inner))
    peak = max(own, matrix_peak(dtype, task.device))
    return {"dtype": run.dtype, "seconds": run.seconds, "body_flops": body, "other_flops": rest,
            "body_flops_per_second": body / run.seconds, "peak_flops_per_second": peak,
            "peak_at_model_shape_flops_per_second": own, "floor_teacher_flops": floor.teacher,
            "floor_student_flops": floor.student, "floor_seconds": floor.flops / peak}  # fmt: skip


# -- scale ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some of the tokens of a long run.

    Attributes:
        stage: What was being done.
        tokens: How many there are.
        seconds: How long it took.
        peak_bytes: Most memory in use meanwhile.
    """

    stage: str
    tokens: int
    seconds: float
    peak_bytes: int


class PartProgress:
    """Listens to a stage, and notes time and memory part by part."""

    def __init__(self, memory: PeakMemory, num_parts: int) -> None:
        self.parts: list[Part] = []
        self._memory, self._num_parts = memory, num_parts

    @contextmanager
    def __call__(self, description: str, /, total: int | None = None, unit: str = "") -> Iterator["_TaskParts"]:
        """Begin a task of the stage; only those that count tokens are noted."""
        self._memory.lap()
        part_size = total / self._num_parts if total and unit == "tokens" else math.inf
        task = _TaskParts(self.parts, self._memory, description, part_size)
        yield task
        task.close()


class _TaskParts:
    """One task of the stage."""

    def __init__(self, parts: list[Part], memory: PeakMemory, stage: str, part_size: float) -> None:
        self._parts, self._memory, self._stage, self._part_size = parts, memory, stage, part_size
        self._done, self._noted, self._since = 0, 0, time.monotonic()

    def advance(self, amount: int = 1, /) -> None:
        """Note a part when it is full."""
        self._done += amount
        if self._done >= self._noted + self._part_size - 0.5:
            self._end_part()

    def close(self) -> None:
        """Note what is left."""
        if self._done > self._noted and self._part_size < math.inf:
            self._end_part()

    def _end_part(self) -> None:
        now = time.monotonic()
        self._parts.append(Part(self._stage, self._done - self._noted, now - self._since, self._memory.lap()))
        self._noted, self._since = self._done, now

    def note(self, text: str, /) -> None:
        """Do nothing."""


def scale(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Distill many tokens with ours, and print time and memory part by part."""
    base = load_tokenizer(arguments.model)
    with note("mining and collecting"):
        records, _ = prepare(arguments, base, arguments.scale)
    tokens = [record.new_token for record in records]
    task = Task(arguments.model, records, extend(base, tokens).expansion, tuple(base.prefix_ids), device)
    with note("ours"), PeakMemory(device) as memory:
        listening = PartProgress(memory, SCALE_PARTS)
        model = task.load("auto")
        clock = Clock(device)
        _distill(task, records, model, DistillConfig(), listening)
        seconds, cpu_seconds = clock.read()
    write(f"{len(tokens):,} tokens, {task.num_snippets:,} snippets in {seconds:.1f} s, {device}, "
          f"{torch.get_num_threads()} threads; {memory.before_bytes / MIB:,.0f} MiB in use before\n")
    write_table(("part", "tokens", "seconds", "tokens/s", "peak MiB"), [
        (part.stage, f"{part.tokens:,}", f"{part.seconds:.1f}", f"{part.tokens / part.seconds:.1f}",
         f"{part.peak_bytes / MIB:,.0f}") for part in listening.parts])  # fmt: skip
    return {"tokens": len(tokens), "snippets": task.num_snippets, "seconds": seconds, "cpu_seconds": cpu_seconds,
            "before_bytes": memory.before_bytes, "parts": [asdict(part) for part in listening.parts]}  # fmt: skip


# -- random weights ---------------------------------------------------------------------------------------------------


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> FrozenModel:
    """Build a tied Llama with random weights, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**RANDOM_MODELS[name], tie_word_embeddings=True))
    return FrozenModel(model, device, dtype)


def random_records(num_tokens: int, num_snippets: int, num_base: int, window: int = 50) -> list[TokenSnippets]:
    """Make tokens of two to four random pieces, and windows of random ids around them."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(num_tokens):
        run = tuple(rng.integers(3, num_base, int(rng.integers(2, 5))).tolist())
        snippets, positions = [], []
        for _ in range(num_snippets):
            text = rng.integers(3, num_base, window - len(run)).tolist()
            at = int(rng.integers(0, int(0.4 * window)))
            snippets.append((*text[:at], num_base + index, *text[at:]))
            positions.append(at)
        token = NewToken(f"token {index}", f"token {index}", run)
        records.append(TokenSnippets(token, tuple(snippets), tuple(positions), num_snippets))
    return records


def compare_random(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run both on random weights and text; print time, rates and memory."""
    num_base = RANDOM_MODELS[arguments.random_model]["vocab_size"]
    records = random_records(arguments.tokens, arguments.snippets, num_base)
    expansion = Expansion([record.new_token for record in records], num_base)
    task = Task(arguments.random_model, records, expansion, (1,), device)
    with note("the reference"):
        snapshots, memory = time_reference(task, _reference_config(arguments))
    reference = replace(_reference_run(snapshots[-1], "bfloat16" if arguments.autocast else "float32"), memory=memory)
    with note("ours"):
        ours = time_ours(task, "")
    with note("counting the work"):
        work = work_of(task, reference, ours, _reference_config(arguments))
    machine = describe(device)
    write(f"{len(records)} tokens, {task.num_snippets:,} snippets, Llama {arguments.random_model} with random weights, "
          f"{machine['device']}, {machine['date']}\n")
    write_table(("", *TIMES, "new tokens/s", "snippets/s", "MFU", *MEMORY), [
        (run.name, *_times(run, reference), f"{len(records) / run.seconds:.1f}",
         f"{task.num_snippets / run.seconds:,.0f}", f"{work[who]['floor_seconds'] / run.seconds:.1%}", *_mebibytes(run))
        for who, run in (("reference", reference), ("ours", ours))])  # fmt: skip
    _print_work(work)
    return {"tokens": len(records), "snippets": task.num_snippets, "work": work,
            "runs": [_run_json(run) for run in (reference, ours)]}  # fmt: skip


# -- output -----------------------------------------------------------------------------------------------------------


def _print_comparison(qualities: dict[str, Quality], reference: Run, ours: Run) -> None:
    rows = []
    for name, run in (("base", None), ("mean", None), (reference.name, reference), (ours.name, ours)):
        q = qualities[name]
        times = ("", "", "") if run is None else _times(run, reference)
        rows.append((name, *times,
                     f"{q.hidden_error:.4f}", f"{q.relative_error:.4f}", f"{q.nll_nats:.4f}", _share(q.gap_recovered),
                     f"{q.bits_per_byte:.4f}", f"{q.bits_per_byte_writing:.4f}", *_mebibytes(run)))  # fmt: skip
    write_table(("", *TIMES, "hidden error", "relative", "NLL, nats", "gap recovered", "bits/byte reading",
                 "bits/byte writing", *MEMORY), rows)  # fmt: skip
    assert ours.result is not None
    kept = sum(report.method != "distill" for report in ours.result.reports)
    left_out = sum(report.left_out is not None for report in ours.result.reports)
    write(f"ours, of {len(ours.result.reports)} tokens: {kept} keep the mean of their pieces; {left_out} would be left "
          f"out of a checkpoint, but count here; {_shown_each(ours)} snippets shown per token\n")


def _print_curve(qualities: dict[str, Quality], runs: Sequence[Run]) -> None:
    write_table(("run", "seconds", "snippets shown per token", "hidden error", "gap recovered"), [
        (run.name, f"{run.seconds:.1f}", _shown_each(run), f"{qualities[run.name].hidden_error:.4f}",
         _share(qualities[run.name].gap_recovered))
        for run in sorted(runs, key=lambda run: (run.result is not None, run.seconds))])  # fmt: skip
    reference = max((run for run in runs if run.result is None), key=lambda run: run.seconds)
    wanted = qualities[reference.name]
    reached = [run for run in runs if run.result is not None
               and qualities[run.name].hidden_error <= wanted.hidden_error
               and (qualities[run.name].gap_recovered or 0) >= (wanted.gap_recovered or 0)]  # fmt: skip
    if reached:
        fastest = min(reached, key=lambda run: run.seconds)
        write(f"at equal or lower error and equal or larger gap: {fastest.name}, "
              f"{reference.seconds / fastest.seconds:.1f} times as fast as the reference\n")
    else:
        write("no run of ours reached both the reference's error and its gap\n")


def _print_work(work: dict[str, Any]) -> None:
    rows = []
    for who in ("reference", "ours"):
        w = work[who]
        rate, peak, own = (w[key] / 1e9 for key in ("body_flops_per_second", "peak_flops_per_second",
                                                    "peak_at_model_shape_flops_per_second"))  # fmt: skip
        floor = w["floor_teacher_flops"] + w["floor_student_flops"]
        rows.append((who, w["dtype"], f"{w['seconds']:.1f}", f"{w['body_flops'] / 1e12:.3f}",
                     f"{w['other_flops'] / 1e12:.3f}", f"{rate:,.0f}", f"{peak:,.0f}", f"{rate / peak:.1%}",
                     f"{own:,.0f}", f"{floor / 1e12:.3f}", f"{w['floor_seconds']:.2f}",
                     f"{w['seconds'] / w['floor_seconds']:.1f}"))  # fmt: skip
    write_table(("", "dtype", "seconds", "layers, TFLOP", "other products, TFLOP", "layers, GFLOP/s", "peak GFLOP/s",
                 "of peak", "peak at the model's shape", "floor, TFLOP", "floor, s at peak", "time / floor"), rows)
    w = work["ours"]
    peak, own = w["peak_flops_per_second"], w["peak_at_model_shape_flops_per_second"]
    write_table(("where our time goes", "seconds"), [
        ("the floor, at peak", f"{w['floor_seconds']:.2f}"),
        ("work in the layers beyond the floor, at peak", f"{w['body_flops'] / peak - w['floor_seconds']:.2f}"),
        ("products of the model's shape slower than the peak", f"{w['body_flops'] / own - w['body_flops'] / peak:.2f}"),
        ("other products, at peak", f"{w['other_flops'] / peak:.2f}"),
        ("everything else: element-wise work, indexing, starting operations, waiting",
         f"{w['seconds'] - w['body_flops'] / own - w['other_flops'] / peak:.2f}")])  # fmt: skip


def _mebibytes(run: Run | None) -> tuple[str, str]:
    if run is None or run.memory is None:
        return "", ""
    peak, before = run.memory
    return f"{peak / MIB:,.0f}", f"{(peak - before) / MIB:,.0f}"


def _times(run: Run, reference: Run) -> tuple[str, str, str]:
    return f"{run.seconds:.1f}", f"{run.cpu_seconds:.1f}", f"{reference.seconds / run.seconds:.1f}"


def _shown_each(run: Run) -> str:
    return f"{_shown(run.result) / len(run.result.reports):.1f}" if run.result else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _run_json(run: Run) -> dict[str, Any]:
    peak, before = run.memory or (None, None)
    return {"name": run.name, "seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "dtype": run.dtype,
            "peak_bytes": peak, "before_bytes": before,
            "relative_error_own_snippets": run.result and run.result.relative_error}  # fmt: skip


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a markdown table and an empty line."""
    write("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        write("| " + " | ".join(row) + " |")
    write("")


def write(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextmanager
def note(what: str) -> Iterator[None]:
    """Tell standard error what is going on and how long it took."""
    began, cpu = time.monotonic(), time.process_time()
    yield
    write_note(f"{what}: {time.monotonic() - began:.1f} s, CPU {time.process_time() - cpu:.1f} s")


def write_note(line: str) -> None:
    """Write a line to standard error at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
