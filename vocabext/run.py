"""All stages in order: from a corpus to a verified, measured checkpoint. Resumable.

Where tokens are chosen by what they cost, more are mined, distilled cheaply (the two stages of the trial) and measured
on documents that are kept from mining; then the chosen ones go the usual way.

Every stage has a key: a digest of its options and of everything it reads (the keys of the stages
before it, the signature of the corpus, the files of the model). A stage whose key is the one that its
output was made with is skipped, so an interrupted run goes on where it stopped and a second run does
nothing. Keys and artifacts lie in a working folder beside the new checkpoint.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabext import __version__
from vocabext.checkpoint.folder import resolve_model
from vocabext.checkpoint.manifest import has_manifest, refuse_expanded
from vocabext.collect import collect, generate_missing, short_of_snippets, write_snippets
from vocabext.corpus import Document, Documents, corpus_signature, left_out_of, read_documents
from vocabext.errors import BadCheckpointError, CorpusError, OutputExistsError, UsageError
from vocabext.files.atomic import read_object, remove_unfinished, write_json
from vocabext.files.folders import locked
from vocabext.mine.stage import mine, read_candidates, write_candidates
from vocabext.options import ChooseConfig, CollectConfig, DistillConfig, EvalConfig, MineConfig, pick
from vocabext.progress import Progress, no_progress

if TYPE_CHECKING:
    from vocabext.model.frozen import FrozenModel

# Without --heldout, one document in this many is kept from mining and distilling, and used to measure.
HELD_OUT_EVERY = 20
# One in as many is kept from mining where tokens are chosen by what they cost there.
CHOICE_EVERY = 20
# The trial: cheap rows of all candidates. One round shows 8 snippets of a token, and two judge it.
TRIAL_SNIPPETS = 10
ROWS_NAME = "rows.safetensors"
# Under this name run.json says with which key the output was begun, when nothing was there.
BEGUN = "patch, begun"
MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".jinja", ".txt")


@dataclass(frozen=True)
class RunConfig:
    """Everything `run` needs to know."""

    model: str
    corpus: tuple[str, ...]
    output: Path
    # Held-out corpus; empty takes documents out of `corpus`.
    heldout: tuple[str, ...] = ()
    text_field: str = "text"
    # Working folder; None is the output's name with `-work` behind it.
    work: Path | None = None
    mine: MineConfig = field(default_factory=MineConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    choose: ChooseConfig = field(default_factory=ChooseConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    force: bool = False
    trust_remote_code: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any], **rest: Any) -> "RunConfig":
        """Make it from the options of all stages; one that several stages have goes to all of them.

        Args:
            options: Fields of `MineConfig`, `CollectConfig`, `DistillConfig`, `ChooseConfig` and `EvalConfig`.
            **rest: Its own fields.
        """
        return cls(mine=pick(MineConfig, options), collect=pick(CollectConfig, options),
                   distill=pick(DistillConfig, options), choose=pick(ChooseConfig, options),
                   evaluate=pick(EvalConfig, options), **rest)

    @property
    def trial(self) -> "RunConfig":
        """The same with what is cheap: the rows by which candidates are judged, of which no model is made."""
        collecting = replace(self.collect, snippets=min(TRIAL_SNIPPETS, self.collect.snippets), generate_missing=False,
                             min_snippets=min(TRIAL_SNIPPETS, self.collect.min_snippets))
        return replace(self, collect=collecting, distill=replace(self.distill, epochs=1, rounds=1))


@dataclass(frozen=True)
class StageOutcome:
    """What happened to one stage: `made`, `up to date` or `not made: ...`, and how long that took."""

    name: str
    state: str
    seconds: float
    output: str


@dataclass(frozen=True)
class _Stage:
    name: str
    key: str
    output: Path
    make: Callable[[], str | None]  # returns why it could not be made, if so


# Name, options, output, and what makes it.
_Plan = tuple[str, Any, Path, Callable[[], str | None]]


def run(config: RunConfig, progress: Progress = no_progress, say: Callable[[str], None] = lambda _: None,
        tell: Callable[[str], None] | None = None) -> list[StageOutcome]:
    """Walk from a corpus to a verified and measured checkpoint.

    Args:
        config: What to do.
        progress: Where stages report.
        say: Told what a user should know, a line at a time.
        tell: Told one line per stage; None is `say`.

    Returns:
        One outcome per stage, in order.

    Raises:
        OutputExistsError: If the output folder exists and was not made by this very run.
        UsageError: If another process is writing the output or the working folder, or an option is wrong.
        BadCheckpointError: If `verify` finds a fault; the folder is kept for inspection.
    """
    folder = _working_folder(config)
    with locked(config.output), locked(folder):  # the whole run: each stage reads what the one before it wrote
        work = _Pipeline(config, folder, progress, say)
        stages = work.stages()
        work.check_output(stages)
        if not all(work.is_done(stage) for stage in stages):
            work.check_inputs()
        with work.made_folder():
            return list(_walk(work, stages, tell or say))


def _working_folder(config: RunConfig) -> Path:
    """Return the working folder, once it is known that it and the output can be made."""
    if not config.output.name:
        raise UsageError(f"the output {config.output} is a folder that is there already; name a new one")
    folder = config.work or config.output.with_name(config.output.name + "-work")
    for path in (config.output, folder):
        if not path.absolute().parent.is_dir():
            raise UsageError(f"the folder {path.absolute().parent} does not exist; create it first")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the working folder {folder} is a file; choose another with --work")
    return folder


def _walk(work: "_Pipeline", stages: list[_Stage], say: Callable[[str], None]) -> Iterator[StageOutcome]:
    for stage in stages:
        began = time.monotonic()
        if work.is_done(stage):
            state = "up to date"
        else:
            reason = stage.make()
            state = f"not made: {reason}" if reason else "made"
            if not reason:
                work.record(stage)
        outcome = StageOutcome(stage.name, state, time.monotonic() - began, str(stage.output))
        say(f"{stage.name}: {state}" + (f" in {outcome.seconds:.1f} s" if state == "made" else ""))
        yield outcome


class _Pipeline:
    """The working folder, and the stages with their keys."""

    def __init__(self, config: RunConfig, folder: Path, progress: Progress, say: Callable[[str], None]) -> None:
        self.config, self.folder, self.progress, self.say = config, folder, progress, say
        self.output = config.output
        self._state_path = self.folder / "run.json"
        self._state = read_object(self._state_path) or {}
        self._patch_key = ""
        self._said: set[str] = set()

    @cached_property
    def base_folder(self) -> Path:
        return resolve_model(self.config.model)

    def stages(self) -> list[_Stage]:
        """Return the stages; each one's key covers all that came before it."""
        c = self.config
        text = {"corpus": corpus_signature(c.corpus), "field": c.text_field,
                "heldout": corpus_signature(c.heldout) if c.heldout else None}
        key = _digest({"vocabext": __version__, "model": _model_signature(self.base_folder), **text})
        candidates, chosen = self.folder / "candidates.jsonl", self.folder / "chosen.jsonl"
        choosing, mining = c.choose.wanted, asdict(c.mine)
        plan = [*self._rows_stages(c, chosen if choosing else candidates, "")]
        if choosing:
            mining["candidates"] = c.choose.num_candidates(c.mine.budget or 0)
            plan = [*self._rows_stages(c.trial, candidates, "trial"),
                    ("choose", asdict(c.choose), chosen, lambda: self._choose(candidates, chosen)), *plan]
        plan = [
            ("mine", mining, candidates, lambda: self._mine(candidates)), *plan,
            ("patch", {}, self.output, self._patch),
            ("verify", {}, self.output / "verify.json", self._verify),
            ("eval", asdict(c.evaluate), self.output / "eval.json", self._evaluate),
        ]
        stages = []
        for name, options, output, make in plan:
            key = _digest({"stage": name, "options": options, "before": key})
            stages.append(_Stage(name, key, output, make))
        return stages

    def _rows_stages(self, c: RunConfig, tokens: Path, kind: str) -> list[_Plan]:
        """Return the stages that make rows of some tokens; the mean of pieces needs no text."""
        before, behind = (f"{kind}-", f", {kind}") if kind else ("", "")
        snippets, rows = self.folder / f"{before}snippets.jsonl", self.folder / f"{before}{ROWS_NAME}"
        if c.distill.method == "mean":
            return [(f"distill{behind}", asdict(c.distill), rows, lambda: self._distill(tokens, rows, c.distill))]
        return [(f"collect{behind}", asdict(c.collect), snippets, lambda: self._collect(tokens, snippets, c.collect)),
                (f"distill{behind}", asdict(c.distill), rows, lambda: self._distill(snippets, rows, c.distill))]

    def is_done(self, stage: _Stage) -> bool:
        return self._state.get(stage.name) == stage.key and stage.output.exists()

    def record(self, stage: _Stage) -> None:
        self._state[stage.name] = stage.key
        write_json(self._state_path, self._state)

    def check_output(self, stages: list[_Stage]) -> None:
        """Refuse at once what `patch` would refuse in the end."""
        (patching,) = (stage for stage in stages if stage.name == "patch")
        self._patch_key = patching.key
        if self.output.exists() and not self.is_done(patching) and not self.config.force and not self._is_ours():
            raise OutputExistsError(self.output)

    def _is_ours(self) -> bool:
        """Tell whether the output is there because this run died between making it and writing that down."""
        return self._state.get(BEGUN) == self._patch_key and has_manifest(self.output)

    def check_inputs(self) -> None:
        """Refuse at once what a later stage would refuse after much work."""
        from vocabext.distill.output_rows.stage import choose_output_rows
        from vocabext.model.frozen import layer_number, parse_max_memory, pick_device
        from vocabext.model.support import check_loads, check_patchable, check_runs
        from vocabext.patch.stage import check_paths
        from vocabext.tokenizer import given_rows

        c = self.config
        refuse_expanded(self.base_folder)
        check_paths(self.output, self.base_folder, self.folder / ROWS_NAME)
        if c.choose.wanted:
            self._check_choice()
        tokenizer = self._tokenizer()
        base = check_patchable(self.base_folder, tokenizer.first_new_id, num_new=c.mine.budget or 1,
                               trust_remote_code=c.trust_remote_code)
        given_rows(tokenizer, base.vocab_size)
        config = base.config
        choose_output_rows(c.distill, architecture=base.names.architecture, tied=base.tied,
                           biased=base.names.head_bias is not None)
        pick_device(c.distill.device)
        if c.distill.max_memory is not None:
            parse_max_memory(c.distill.max_memory)
        if c.distill.method == "distill" or c.choose.wanted:
            check_runs(self.base_folder, trust_remote_code=c.trust_remote_code)
        if c.distill.method == "distill":
            if c.collect.generate_missing:
                check_loads(self.base_folder, trust_remote_code=c.trust_remote_code)
            self._check_model(len(tokenizer.prefix_ids))
        num_layers = (config.get("text_config") or config).get("num_hidden_layers")
        if isinstance(num_layers, int) and c.distill.method == "distill":
            layer_number(c.distill.target_layer, num_layers)
        if c.heldout:
            next(self._held_out_documents(), None)

    def _check_choice(self) -> None:
        """Refuse what `choose` would refuse after all candidates were distilled."""
        option = "--max-loss" if self.config.choose.candidates is None else "--candidates"
        if self.config.mine.budget is None:
            raise UsageError(f"--budget is 'auto', but {option} chooses among more tokens than are shipped; pass a "
                             "number to --budget")
        if next(self._choice_documents(), None) is None:
            raise CorpusError(f"the corpus is too small for {option}: one document in {CHOICE_EVERY} is kept from "
                              "mining to measure what tokens cost, and there is none; give more text")

    def _check_model(self, num_prefix: int) -> None:
        """Refuse a model that computes otherwise than its class; that shows only where its weights are loaded."""
        if self._state.get("distill") is not None and (self.folder / ROWS_NAME).exists():
            return  # it was distilled with
        with self._model(self.output) as model:
            window = self.config.collect.window
            if num_prefix + window > model.max_positions:
                raise UsageError(f"--window is {window}, but the model takes {model.max_positions} positions, "
                                 f"{num_prefix} of them in front of each text; pass a smaller --window")

    @contextmanager
    def _model(self, beside: Path, *, runs: bool = True) -> Iterator["FrozenModel"]:
        """Load the base as `distill` does."""
        from vocabext.model.frozen import load_model, offloading

        compute = self.config.distill
        with offloading(beside) as elsewhere:
            yield load_model(self.base_folder, device=compute.device, dtype=compute.dtype,
                             trust_remote_code=self.config.trust_remote_code, max_memory=compute.max_memory,
                             offload_folder=elsewhere, runs=runs)

    @contextmanager
    def made_folder(self) -> Iterator[None]:
        """Make the working folder; if nothing was made in it, remove it again."""
        is_new = not self.folder.exists()
        self.folder.mkdir(exist_ok=True)
        for folder in (self.folder, self.output):
            remove_unfinished(folder)
        try:
            yield
        finally:
            if is_new:
                with suppress(OSError):  # it holds something
                    self.folder.rmdir()

    # -- stages ---------------------------------------------------------------------------------------------------

    def _mine(self, output: Path) -> None:
        base = self._tokenizer()
        documents = self._mining_documents()
        config, budget = self.config.mine, self.config.mine.budget
        if budget is None or not self.config.choose.wanted:
            result = mine(documents, base, config, self.progress)
        else:
            config = replace(config, budget=self.config.choose.num_candidates(budget))
            result = mine(documents, base, config, self.progress, at_most=True)
            if len(result.tokens) < budget:
                raise UsageError(f"--budget is {budget}, but only {len(result.tokens)} tokens that occur at least "
                                 f"{config.min_count} times can be made; lower --budget, lower --min-count, or give "
                                 "more text")
        write_candidates(output, result, base, model=self.config.model, config=config,
                         corpus=self.config.corpus, left_out=left_out_of(documents))

    def _collect(self, candidates: Path, output: Path, config: CollectConfig) -> None:
        base = self._tokenizer()
        header, tokens = read_candidates(candidates)
        documents = self._mining_documents()
        records = collect(documents, base, tokens, config, self.progress)
        if config.generate_missing and short_of_snippets(records, config):
            with self._model(output, runs=False) as model:
                records = generate_missing(records, model, base, config, self.progress)
        write_snippets(output, records, header, config=config, corpus=self.config.corpus,
                       left_out=left_out_of(documents))

    def _distill(self, source: Path, output: Path, config: DistillConfig) -> None:
        from vocabext.distill import distill_file

        distill_file(source, self.config.model, output, config, force=True,
                     trust_remote_code=self.config.trust_remote_code, progress=self.progress,
                     say=self._say_once)

    def _choose(self, candidates: Path, output: Path) -> None:
        from vocabext.checkpoint.folder import load_rows
        from vocabext.choose.stage import choose, write_choice

        config, budget, documents = self.config.choose, self.config.mine.budget, self._choice_documents()
        if budget is None:
            raise UsageError("--budget is 'auto'; pass a number")
        header, _ = read_candidates(candidates)
        tokens, rows, facts = load_rows(self.folder / f"trial-{ROWS_NAME}")
        with self._model(output) as model:
            choice = choose(tokens, rows.input_ND, model, self._tokenizer(), documents, self._held_out_documents(),
                            config, budget=budget, progress=self.progress,
                            unfit={one["token"]: one["left_out"] for one in facts["left_out"]})
        write_choice(output, choice, {**header, "options": {**header["options"], **asdict(config)}})
        for line in choice.lines():
            self.say(line)

    def _patch(self) -> None:
        from vocabext.patch.stage import patch

        force = self.config.force or self._is_ours()
        if not self.output.exists():
            self._state[BEGUN] = self._patch_key
            write_json(self._state_path, self._state)
        patch(self.folder / ROWS_NAME, self.config.model, self.output, force=force,
              trust_remote_code=self.config.trust_remote_code, progress=self.progress, say=self.say)

    def _verify(self) -> None:
        from vocabext.verify.stage import VERIFY_NAME, verify

        if self.config.distill.max_memory is not None:
            self.say(f"--max-memory is {self.config.distill.max_memory}, but verify loads each model whole; where that "
                     "does not fit, it says that logits were not compared")
        result = verify(self.output, self.config.model, self._all_documents(), progress=self.progress,
                        trust_remote_code=self.config.trust_remote_code)
        write_json(self.output / VERIFY_NAME, result.to_json())
        if not result.passed:
            failed = [f"{check.name} ({check.detail})" for check in result.checks if check.verdict == "fail"]
            raise BadCheckpointError(f"{self.output} failed verification: {'; '.join(failed)}")

    def _evaluate(self) -> str | None:
        from vocabext.evaluate.stage import evaluate_folder
        from vocabext.model.support import check_runs, why_not

        reason = why_not(lambda: check_runs(self.base_folder, trust_remote_code=self.config.trust_remote_code))
        if reason is not None:  # the mean of the pieces can be made, but not measured
            return reason
        if next(self._held_out_documents(), None) is None:
            return "the corpus is too small to hold a document out; pass --heldout"
        try:
            evaluate_folder(self.output, self.config.model, self._held_out_documents(), self.config.evaluate,
                            trust_remote_code=self.config.trust_remote_code, progress=self.progress)
        except UsageError as error:  # some classes are known to compute otherwise only when they are loaded
            if self.config.distill.method != "mean":
                raise
            return str(error)
        return None

    # -- text -----------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Any:
        from vocabext.tokenizer import load_base

        return load_base(self.base_folder, trust_remote_code=self.config.trust_remote_code)

    def _mining_documents(self) -> Documents:
        documents = self._not_held_out_documents()
        if not self.config.choose.wanted:
            return documents
        return Documents((d for d in documents if not is_kept_for_choice(d)), documents.left_out)

    def _choice_documents(self) -> Documents:
        """Return the documents on which tokens are chosen: neither mined nor held out."""
        documents = self._not_held_out_documents()
        return Documents((d for d in documents if is_kept_for_choice(d)), documents.left_out)

    def _not_held_out_documents(self) -> Documents:
        documents = self._read(*self.config.corpus)
        if not self.config.heldout:
            return Documents((d for d in documents if not is_held_out(d)), documents.left_out)
        return Documents((d for d in documents if _text_digest(d) not in self._held_out_texts), documents.left_out)

    @cached_property
    def _held_out_texts(self) -> set[bytes]:
        """Digests of the held-out texts; what the corpus holds of them is not mined."""
        held_out = {_text_digest(document) for document in self._held_out_documents()}
        if common := sum(_text_digest(document) in held_out for document in self._read(*self.config.corpus)):
            self.say(f"{common:,} documents of the corpus are in --heldout, too; they are not mined")
        return held_out

    def _held_out_documents(self) -> Documents:
        documents = self._read(*(self.config.heldout or self.config.corpus))
        if self.config.heldout:
            return documents
        return Documents((d for d in documents if is_held_out(d)), documents.left_out)

    def _all_documents(self) -> Documents:
        return self._read(*self.config.corpus, *self.config.heldout)

    def _read(self, *sources: str) -> Documents:
        return read_documents(sources, text_field=self.config.text_field, say=self._say_once)

    def _say_once(self, line: str) -> None:
        """Say something unless it was said: several stages read the same corpus."""
        if line not in self._said:
            self._said.add(line)
            self.say(line)


def is_held_out(document: Document) -> bool:
    """Tell whether a document is kept from mining: decided by its text, so the same text always is."""
    return zlib.crc32(document.text.encode()) % HELD_OUT_EVERY == 0


def is_kept_for_choice(document: Document) -> bool:
    """Tell whether a document is kept from mining to choose tokens on; none that is held out is."""
    return zlib.crc32(document.text.encode()) % CHOICE_EVERY == 1


def _text_digest(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _model_signature(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of every file of a model that matters."""
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_SUFFIXES and path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
