"""Distill the same tokens with the reference's training step and with ours; print time, error and memory of both.

    python benchmarks/distill_reference.py [--model DIR --corpus FILE --heldout FILE] [-o result.json]
    python benchmarks/distill_reference.py --scale 5000
    python benchmarks/distill_reference.py --random-model 1b

The first form needs nothing but $VOCABEXT_ASSETS (../shared/assets): 500 tokens, 25 snippets each, on biomed-13m.
Both run in this process, one after the other, on the same model, tokens, snippets and threads; ours pays for
whatever it compiles. Neither is charged for loading, tokenizing or finding snippets. Then both are measured in
float32 on held-out documents with all new tokens merged: mean squared error of last-layer hidden states, share of
the gap recovered, bits per byte (quality.py). The work that matrix products take is counted in another run.

`--scale N` distills N tokens with ours alone (with the first of --ours, if any) and shows time and memory part by
part. `--random-model` takes random weights and random text: time and memory only; on a GPU,

    python benchmarks/distill_reference.py --random-model 1b -o benchmarks/distill_gpu.json

is all there is to do. `--keep DIR` keeps what is done, so that long runs can be had in several sittings; `--docs FILE`
writes the tables of the JSON files beside this script into a document. reference_step.py says how the reference was
read.
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
from distill_tables import render, section
from kept import Kept, Made, Run
from machine import Clock, PeakMemory, describe, matrix_peak, release_memory
from quality import measure
from reference_step import ReferenceConfig, lay_out, run_reference, schedule
from sections import put_section
from transformers.utils import logging as transformers_logging
from work import BodyShape, Floor, WorkCounter, floor_of, reference_work

from vocabext.checkpoint.rows import mean_rows
from vocabext.collect import collect
from vocabext.corpus import Document, read_documents
from vocabext.distill import DistillResult, distill
from vocabext.errors import UsageError
from vocabext.evaluate.stage import RowSet
from vocabext.files.atomic import write_json
from vocabext.mine.stage import mine
from vocabext.model.frozen import FrozenModel, load_model, pick_device, pick_dtype
from vocabext.options import CollectConfig, DistillConfig, MineConfig
from vocabext.progress import Progress, no_progress
from vocabext.run import is_held_out
from vocabext.tokenizer import BaseTokenizer, extend, load_tokenizer
from vocabext.tokens import Expansion, NewToken, TokenSnippets

ASSETS = Path(os.environ.get("VOCABEXT_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))
# What ours is run with beside the defaults, cheapest first: a number of snippets, and options of DistillConfig.
BUDGETS = ("snippets=8,epochs=1", "snippets=12,epochs=1", "epochs=1", "epochs=1,reach=4", "epochs=2",
           "epochs=1,silence=0.02")
DEFAULTS = "defaults"
# The verb gives a tied model a head with rows of their own, and so need not keep input rows silent; nor does ours here.
# Making output rows is not part of anybody's time.
NOT_SILENT = 0.0
SCALE_PARTS = 10
STEPS = ("snippets", "reference", "ours")
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
}


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


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    arguments = _parse(argv)
    if arguments.docs:
        put_section(arguments.docs, section(Path(__file__).parent))
        return
    device = pick_device(arguments.device)
    transformers_logging.disable_progress_bar()
    if arguments.random_model:
        found = compare_random(arguments, device)
    elif arguments.scale:
        found = scale(arguments, device)
    else:
        found = compare(arguments, device)
    if found is None:
        return
    whole = {"options": options_of(arguments), "machine": describe(device), **found}
    write(render(whole))
    if arguments.output:
        write_json(arguments.output, whole)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options as JSON-ready values, without folders that say nothing to others."""
    apart = ("keep", "stop_after", "docs", "output")
    return {key: value.name if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in vars(arguments).items() if key not in apart}


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
    parser.add_argument("--ours", nargs="*", metavar="KEY=VALUE,...",
                        help="further budgets of ours, snippets=N and options of distill; those that would take longer "
                             "than the reference are left out; with --scale, the one that is used "
                             f"(default: {' '.join(BUDGETS)})")
    parser.add_argument("--merged", choices=("all", "own"), default="all",
                        help="which new tokens the reference merges in a snippet")
    parser.add_argument("--autocast", action="store_true", help="let the reference multiply in bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scale", type=int, metavar="N", help="distill N tokens with ours, part by part")
    parser.add_argument("--random-model", choices=tuple(RANDOM_MODELS), help="random weights; time and memory only")
    parser.add_argument("--keep", type=Path, metavar="DIR",
                        help="keep what is done there; the same call goes on after it, on the same machine")
    parser.add_argument("--stop-after", choices=STEPS, help="go no further than this step")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the tables of the JSON files into FILE")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args(argv)
    if arguments.corpus is None:
        arguments.corpus, arguments.heldout = (corpora / f"medquad{part}.jsonl.gz" for part in ("", ".heldout"))
    if not arguments.random_model:
        for path in filter(None, (arguments.model, arguments.corpus, arguments.heldout)):
            if not path.exists():
                parser.error(f"{path} does not exist; give --model and --corpus, or set VOCABEXT_ASSETS")
    if arguments.ours is None:
        arguments.ours = [] if arguments.scale else list(BUDGETS)
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
                               for key, value in pairs.items()}
    return (None if snippets is None else int(snippets)), DistillConfig(**{"silence": NOT_SILENT, **options})


def _literal(text: str) -> Any:
    """Read a number, true, false or none; anything else is a string."""
    try:
        return literal_eval(text.title() if text.isalpha() else text)
    except (SyntaxError, ValueError):
        return text


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    """Run both, measure both, print the tables; None if it was to stop before."""
    base = load_tokenizer(arguments.model)
    kept = Kept(arguments.keep, {**options_of(arguments), "ours": None, **machine_facts(device)})
    with note("mining and collecting"):
        records = kept.records(lambda: prepare(arguments, base, arguments.tokens))
    tokens = [record.new_token for record in records]
    expanded = extend(base, tokens)
    task = Task(arguments.model, records, expanded.expansion, tuple(base.prefix_ids), device)
    if arguments.stop_after == "snippets":
        return None
    config = _reference_config(arguments)
    with note("the reference"):
        references = kept.runs("reference", lambda: reference_runs(task, config))
    if arguments.stop_after == "reference":
        return None
    runs: list[Run] = []
    # The defaults first: warming up is theirs to pay.
    for budget in ("", *arguments.ours):
        if runs and (expected := _expected_seconds(budget, runs[0], arguments.snippets)) > references[-1].seconds:
            write_note(f"ours, {budget}: left out, would take about {expected:.0f} s, longer than the reference")
            continue
        with note(f"ours, {budget or DEFAULTS}"):
            runs += kept.runs(f"ours, {budget or DEFAULTS}", lambda budget=budget: [time_ours(task, budget)])
    peaks = kept.value("peaks", lambda: matrix_peaks(task, {run.dtype for run in (references[-1], runs[0])}))
    if arguments.stop_after == "ours":
        return None
    with note("measuring on held-out text"):
        release_memory(device)
        model = task.load("float32")
        sets = row_sets([*references, *runs], model, tokens)
        qualities = measure(heldout_documents(arguments), model, base, expanded, sets, arguments.max_bytes)
        del model
    with note("counting the work"):
        work = work_of(task, references[-1], runs[0], config, peaks)
    return {"tokens": len(tokens), "snippets": task.num_snippets, "work": work,
            "quality": {name: asdict(q) for name, q in qualities.items()},
            "runs": [_run_json(run) for run in (*references, *runs)]}


def machine_facts(device: torch.device) -> dict[str, object]:
    """Return what must be the same for two times to be comparable."""
    return {key: value for key, value in describe(device).items() if key not in ("date", "load_average")}


def prepare(arguments: argparse.Namespace, base: BaseTokenizer, num_tokens: int) -> list[TokenSnippets]:
    """Mine tokens and collect their snippets."""
    mining = list(read_documents([str(arguments.corpus)]))
    if not arguments.heldout:
        mining = [document for document in mining if not is_held_out(document)]
    config = MineConfig(budget=num_tokens, min_count=arguments.min_count)
    tokens = mine(mining, base, config, at_most=True).tokens
    collecting = CollectConfig(snippets=arguments.snippets, min_snippets=min(8, arguments.snippets))
    return collect(mining, base, tokens, collecting)


def heldout_documents(arguments: argparse.Namespace) -> list[Document]:
    """Read documents that nothing was mined from."""
    documents = read_documents([str(arguments.heldout or arguments.corpus)])
    return [document for document in documents if arguments.heldout or is_held_out(document)]


def reference_runs(task: Task, config: ReferenceConfig) -> list[Run]:
    """Run the reference; returns what it had made at several times, the last at its end."""
    pairs = lay_out(task.records, task.expansion, task.prefix_ids, config.merged)
    with PeakMemory(task.device) as memory:
        model = task.load("float32")
        snapshots = run_reference(pairs, model, task.expansion, config)
        del model
    runs = [Run(f"reference, {snapshot.share:.3g} epoch", snapshot.seconds, snapshot.cpu_seconds,
                "bfloat16" if config.autocast else "float32", snapshot.input_ND, snapshot.output_ND)
            for snapshot in snapshots]
    return [*runs[:-1], replace(runs[-1], memory=(memory.peak_bytes, memory.before_bytes))]


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
               (memory.peak_bytes, memory.before_bytes), Made.of(result))


def _expected_seconds(budget: str, defaults: Run, num_snippets: int) -> float:
    """Guess from how long the defaults took how long a budget takes at most."""
    snippets, config = _budget(budget)
    share = min(1.0, (num_snippets if snippets is None else snippets) / num_snippets)
    return defaults.seconds * share * config.epochs / DistillConfig().epochs


def _distill(task: Task, records: Sequence[TokenSnippets], model: FrozenModel, config: DistillConfig,
             progress: Progress = no_progress) -> DistillResult:
    return distill(records, model, config, first_new_id=task.expansion.first_new_id, prefix_ids=task.prefix_ids,
                   progress=progress)


def _reference_config(arguments: argparse.Namespace) -> ReferenceConfig:
    return ReferenceConfig(merged=arguments.merged, autocast=arguments.autocast)


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


def matrix_peaks(task: Task, dtypes: set[str]) -> dict[str, dict[str, float]]:
    """Measure what matrix products reach here, per dtype: of large squares, and at the model's own shape."""
    model = task.load("float32")
    shape = BodyShape.of(model)
    del model
    found = {}
    for name in sorted(dtypes):
        dtype = getattr(torch, name)
        own = matrix_peak(dtype, task.device, (SHAPE_POSITIONS, shape.hidden, shape.inner))
        found[name] = {"own": own, "peak": max(own, matrix_peak(dtype, task.device))}
    return found


def work_of(task: Task, reference: Run, ours: Run, config: ReferenceConfig, peaks: dict[str, dict[str, float]]
            ) -> dict[str, Any]:
    """Count what both did and the least that ours needed."""
    assert ours.made is not None
    counter = count_ours(task, ours.made)
    model = task.load("float32")
    shape, tied = BodyShape.of(model), model.tied
    del model
    batches = schedule(lay_out(task.records, task.expansion, task.prefix_ids, config.merged), config)
    rows = max(shape.rows, task.expansion.end_id)
    body, head = reference_work(shape, batches, rows, tied=tied)
    num_prefix, options = len(task.prefix_ids), DistillConfig()
    least = floor_of(shape, task.records, task.expansion, num_prefix, layer=ours.made.layer,
                     shown=ours.made.shown, epochs=options.epochs,
                     reach=options.reach)
    once = floor_of(shape, task.records, task.expansion, num_prefix, layer=shape.layers,
                    shown=[len(record.snippets) for record in task.records], epochs=1)
    other, by_part = sum(counter.flops.values()) - counter.body, sorted(counter.flops.items())
    return {"reference": _work_json(peaks, reference, body, head, once),
            "ours": _work_json(peaks, ours, counter.body, other, least),
            "ours_by_part": {f"{part} {way}": count for (part, way), count in by_part}}


def count_ours(task: Task, timed: Made) -> WorkCounter:
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
    counter.scale(sum(timed.shown) / max(1, sum(report.shown for report in result.reports)))
    return counter


def _work_json(peaks: dict[str, dict[str, float]], run: Run, body: int, rest: int, floor: Floor) -> dict[str, Any]:
    own, peak = peaks[run.dtype]["own"], peaks[run.dtype]["peak"]
    return {"dtype": run.dtype, "seconds": run.seconds, "body_flops": body, "other_flops": rest,
            "body_flops_per_second": body / run.seconds, "peak_flops_per_second": peak,
            "peak_at_model_shape_flops_per_second": own, "floor_teacher_flops": floor.teacher,
            "floor_student_flops": floor.student, "floor_seconds": floor.flops / peak}


# -- scale ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some of the snippets of a long run.

    Attributes:
        stage: What was being done.
        snippets: How many went through the model, repetitions included.
        seconds: How long it took.
        cpu_seconds: Processor time of all threads.
        peak_bytes: Most memory in use meanwhile.
    """

    stage: str
    snippets: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


class PartProgress:
    """Listens to a stage, and notes time and memory part by part."""

    def __init__(self, memory: PeakMemory, num_parts: int) -> None:
        self.parts: list[Part] = []
        self._memory, self._num_parts = memory, num_parts

    @contextmanager
    def __call__(self, description: str, /, total: int | None = None, unit: str = "") -> Iterator["_TaskParts"]:
        """Begin a task of the stage; only those that count snippets are noted."""
        self._memory.lap()
        part_size = total / self._num_parts if total and unit == "snippets" else math.inf
        task = _TaskParts(self.parts, self._memory, description, part_size)
        yield task
        task.close()


class _TaskParts:
    """One task of the stage."""

    def __init__(self, parts: list[Part], memory: PeakMemory, stage: str, part_size: float) -> None:
        self._parts, self._memory, self._stage, self._part_size = parts, memory, stage, part_size
        self._done, self._noted = 0, 0
        self._since, self._cpu_since = time.monotonic(), time.process_time()

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
        now, cpu_now = time.monotonic(), time.process_time()
        self._parts.append(Part(self._stage, self._done - self._noted, now - self._since, cpu_now - self._cpu_since,
                                self._memory.lap()))
        self._noted, self._since, self._cpu_since = self._done, now, cpu_now

    def skip(self, amount: int, /) -> None:
        """Do nothing."""

    def note(self, text: str, /) -> None:
        """Do nothing."""


def scale(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    """Distill many tokens with ours, and print time and memory part by part."""
    base = load_tokenizer(arguments.model)
    kept = Kept(arguments.keep, {**options_of(arguments), "ours": None, **machine_facts(device)})
    with note("mining and collecting"):
        records = kept.records(lambda: prepare(arguments, base, arguments.scale))
    if arguments.stop_after:
        return None
    num_snippets, config = _budget(next(iter(arguments.ours), ""))
    records = [_capped(record, num_snippets) for record in records]
    tokens = [record.new_token for record in records]
    task = Task(arguments.model, records, extend(base, tokens).expansion, tuple(base.prefix_ids), device)
    with note("ours"), PeakMemory(device) as memory:
        listening = PartProgress(memory, SCALE_PARTS)
        model = task.load("auto")
        clock = Clock(device)
        _distill(task, records, model, config, listening)
        seconds, cpu_seconds = clock.read()
    return {"tokens": len(tokens), "snippets": sum(len(record.snippets) for record in records),
            "seconds": seconds, "cpu_seconds": cpu_seconds,
            "before_bytes": memory.before_bytes, "parts": [asdict(part) for part in listening.parts]}


# -- random weights ---------------------------------------------------------------------------------------------------


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> FrozenModel:
    """Build a tied Llama with random weights, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**RANDOM_MODELS[name], tie_word_embeddings=True))
    return FrozenModel(model, device, dtype)


def random_records(num_tokens: int, num_snippets: int, first_new_id: int, window: int = 50) -> list[TokenSnippets]:
    """Make tokens of two to four random pieces, and windows of random ids around them."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(num_tokens):
        run = tuple(rng.integers(3, first_new_id, int(rng.integers(2, 5))).tolist())
        snippets, positions = [], []
        for _ in range(num_snippets):
            text = rng.integers(3, first_new_id, window - len(run)).tolist()
            at = int(rng.integers(0, int(0.4 * window)))
            snippets.append((*text[:at], first_new_id + index, *text[at:]))
            positions.append(at)
        token = NewToken(f"token {index}", f"token {index}", run)
        records.append(TokenSnippets(token, tuple(snippets), tuple(positions), num_snippets))
    return records


def compare_random(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run both on random weights and text; print time, rates and memory."""
    first_new_id = RANDOM_MODELS[arguments.random_model]["vocab_size"]
    records = random_records(arguments.tokens, arguments.snippets, first_new_id)
    expansion = Expansion([record.new_token for record in records], first_new_id)
    task = Task(arguments.random_model, records, expansion, (1,), device)
    with note("the reference"):
        reference = reference_runs(task, _reference_config(arguments))[-1]
    with note("ours"):
        ours = time_ours(task, "")
    with note("counting the work"):
        peaks = matrix_peaks(task, {reference.dtype, ours.dtype})
        work = work_of(task, reference, ours, _reference_config(arguments), peaks)
    return {"tokens": len(records), "snippets": task.num_snippets, "work": work,
            "runs": [_run_json(run) for run in (reference, ours)]}


# -- output -----------------------------------------------------------------------------------------------------------


def _run_json(run: Run) -> dict[str, Any]:
    peak, before = run.memory or (None, None)
    return {"name": run.name, "seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "dtype": run.dtype,
            "peak_bytes": peak, "before_bytes": before,
            "shown_per_token": run.made and sum(run.made.shown) / len(run.made.shown),
            "at_start": run.made and run.made.at_start, "left_out": run.made and run.made.left_out,
            "relative_error_own_snippets": run.made and run.made.relative_error}


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
