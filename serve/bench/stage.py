"""Measure base and expanded on the same texts, in turn, under vLLM's own benchmark client.

A round is base, expanded, base again, at every point (`scenarios.py`). The unit is seconds per *text* or per output
*character*; tokens per second falls when a tokenizer improves, so it appears nowhere. `compare.py` gives the verdicts,
`journal.py` keeps passes on the disk.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from vocabext.checkpoint.folder import resolve_model
from vocabext.corpus import Document, left_out_of, read_documents
from vocabext.errors import ServerError, UsageError, VocabextError
from vocabext.files.atomic import write_json
from vocabext.files.ranges import file_sha256
from vocabext.progress import Progress, no_progress
from vocabext.serve.bench.answers import AnswerPlan, plan_answers
from vocabext.serve.bench.client import Job, Load, LoadClient, write_prompts
from vocabext.serve.bench.journal import COMPLETE, PARTIAL, Journal, Pass, Step
from vocabext.serve.bench.pool import BASE, EXPANDED, SETTLE_SECONDS, ServerPool
from vocabext.serve.bench.scenarios import (
    CONTEXT_MARGIN_TOKENS,
    DEFAULT_PROMPT_TOKENS,
    PREFILL,
    SCENARIOS,
    Point,
    PromptShape,
    build_prompts,
    max_output_tokens,
    points_of,
    tokens_per_character,
)
from vocabext.serve.bench.summary import summarize
from vocabext.serve.engine import (
    START_TIMEOUT_SECONDS,
    Server,
    flag_value,
    has_flag,
    require_vllm,
    vllm_device,
    vllm_server,
)
from vocabext.serve.model import Encoder, context_length, load_encoder, require_verified
from vocabext.serve.provenance import provenance

ROUND = (BASE, EXPANDED, BASE)
MAX_CORPUS_CHARACTERS = 50_000_000
WARM_UP_REQUESTS = 2
NUM_SAMPLE_ANSWERS = 2
TWO_ON_ONE_GPU = "0.42"  # share of a GPU's memory for each of two servers; vLLM's own default is 0.9


@dataclass(frozen=True)
class BenchConfig(PromptShape):
    """Options of `serve bench`."""

    # Rounds of base, expanded, base. Fewer than five give no verdict.
    pairs: int = 5
    # What is measured: prefill, decode, mixed.
    scenario: tuple[str, ...] = SCENARIOS
    # Requests in flight at once, one point each. With 1, the time of a request is the time of the machine.
    concurrency: tuple[int, ...] = (1,)
    # Requests arriving per second, one point each.
    rate: tuple[float, ...] = ()
    # Latency target of goodput; None is no limit.
    target_ttft_seconds: float | None = None
    target_request_seconds: float | None = None
    # Run one server at a time, for machines that do not hold both in memory.
    one_at_a_time: bool = False
    start_timeout_seconds: float = START_TIMEOUT_SECONDS
    seed: int = 0
    trust_remote_code: bool = False
    # Further flags for both servers.
    vllm_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        counts = [(name, getattr(self, name)) for name in ("pairs", *(field.name for field in fields(PromptShape)))]
        for name, value in [*counts, *(("concurrency", count) for count in self.concurrency)]:
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        for name in ("target_ttft_seconds", "target_request_seconds"):
            if (limit := getattr(self, name)) is not None and not limit > 0:
                raise UsageError(f"--{name.replace('_', '-')} is {limit}; it must be above 0")
        for rate in self.rate:
            if not 0 < rate < float("inf"):
                raise UsageError(f"--rate is {rate}; it must be a number of requests per second above 0")
        if unknown := set(self.scenario) - set(SCENARIOS):
            raise UsageError(f"--scenario is {unknown.pop()!r}; it must be one of {', '.join(SCENARIOS)}")
        if not self.points:
            raise UsageError("there is nothing to measure; pass --concurrency or --rate")

    @property
    def points(self) -> tuple[Point, ...]:
        """Every scenario at every load."""
        return points_of(self.scenario, self.concurrency, self.rate)

    @property
    def target(self) -> dict[str, float | None]:
        """The latency target of goodput."""
        return {"ttft_seconds": self.target_ttft_seconds, "request_seconds": self.target_request_seconds}


@dataclass(frozen=True)
class Setting:
    """Everything a comparison needs before the first server starts.

    Attributes:
        config: The options.
        folders: The model folder of each role.
        encoders: The tokenizer of each role.
        prompts: The prompts of each scenario.
        context: Tokens of the context, None if unknown.
        device: `cpu` or `gpu`.
        most_answer_tokens: Most tokens that an answer may take.
    """

    config: BenchConfig
    folders: Mapping[str, Path]
    encoders: Mapping[str, Encoder]
    prompts: Mapping[str, tuple[str, ...]]
    context: int | None
    device: str
    most_answer_tokens: int

    @cached_property
    def prompt_tokens(self) -> dict[str, dict[str, list[int]]]:
        """Tokens of each prompt of each scenario, under both tokenizers."""
        return {role: {name: [len(encoder.encode(prompt)) for prompt in prompts]
                       for name, prompts in self.prompts.items()} for role, encoder in self.encoders.items()}

    @property
    def needed_tokens(self) -> int:
        """How long the servers' context must be for the longest prompt and any answer."""
        longest = max(max(counts) for by_name in self.prompt_tokens.values() for counts in by_name.values())
        return longest + self.most_answer_tokens + 4 * CONTEXT_MARGIN_TOKENS

    def requests(self, point: Point) -> int:
        """Return how many requests a pass of a point sends."""
        return min(len(self.prompts[point.scenario]), point.num_requests(self.config.texts))


def run_bench(
    base: str, expanded: str, corpus: Sequence[str], *, config: BenchConfig, output: Path, text_field: str = "text",
    force: bool = False, unverified: bool = False, check_digests: bool = False, log_folder: Path,
    progress: Progress = no_progress, say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Start both servers, measure them in turn, and stop them.

    Args:
        base: Base model, folder or hub id.
        expanded: Expanded model, folder or hub id.
        corpus: Held-out documents, from which prompts are cut.
        config: The options.
        output: bench.json: written after every pass; a partial one of the same settings is taken up again.
        text_field: Field with the text in `.jsonl` and `.parquet`.
        force: Begin anew whatever `output` holds.
        unverified: Serve an expanded folder that `verify` has not passed as it is now.
        check_digests: Compare the weights' digests with verify.json, too, not only their sizes.
        log_folder: An existing folder for the logs of the servers and of the load generator.
        progress: Told of every pass.
        say: Told what of the corpus is not read.

    Returns:
        The content of bench.json.

    Raises:
        MissingExtraError: If vLLM is not installed.
        CheckpointError: If an expanded folder was not verified, failed, or was changed since.
        ServerError: If a server or the load generator does not start, or dies. What was measured is in `output`.
        CorpusError: If the corpus holds too little text.
        OutputExistsError: If `output` is there and is not a partial result.
    """
    require_vllm()
    about = provenance()
    documents = read_documents(corpus, text_field=text_field, say=say)  # a wrong path is said before a download
    folders = {BASE: resolve_model(base), EXPANDED: resolve_model(expanded)}
    if not unverified:
        for folder in folders.values():
            require_verified(folder, check_digests=check_digests)
    encoders = {role: load_encoder(folder, trust_remote_code=config.trust_remote_code)
                for role, folder in folders.items()}
    context = _context(folders.values(), config.vllm_flags)
    texts = _texts(documents)
    most = max_output_tokens(config.output_characters, tokens_per_character(texts, encoders.values()))
    prompts = build_prompts(texts, encoders[BASE], config, config.points, context, config.seed, answer_tokens=most)
    setting = Setting(config, folders, encoders, prompts, context, vllm_device(), most)
    journal = Journal.open(output, settings_of(setting, base, expanded, about), force=force)
    journal.notes["documents"] = _described(texts)
    head = {BASE: base, EXPANDED: expanded, "corpus": list(corpus), "left_out": left_out_of(documents),
            "device": setting.device, "provenance": about}

    def make(role: str, *, alone: bool) -> Server:
        flags = server_flags(config, context, setting.device, setting.needed_tokens, alone=alone)
        journal.notes["server_flags"] = list(flags)
        return vllm_server(folders[role], log_folder / f"{role}.log", name=f"the {role} server", served_name=role,
                           flags=flags)

    with LoadClient(log_folder / "client.log") as client:
        return compare_servers(setting, make, client, journal, head, log_folder=log_folder, progress=progress)


def compare_servers(
    setting: Setting, make: Callable[..., Server], client: LoadClient, journal: Journal, head: Mapping[str, Any], *,
    log_folder: Path, progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure what the journal does not hold yet, write bench.json, and return its content, which begins with `head`.

    `make` describes the server of a role; `alone=` tells it whether nothing else runs beside. Prompts are written to
    `log_folder`, which must exist.

    Raises:
        ServerError: If a server or the load generator dies. The partial result is written before.
    """
    journal.notes["prompt_characters"] = {name: [len(p) for p in prompts] for name, prompts in setting.prompts.items()}
    journal.notes["prompt_tokens"] = setting.prompt_tokens
    try:
        _measure_all(setting, make, client, journal, log_folder, progress)
    except VocabextError as error:
        raise _stopped(error, setting, journal, head) from None
    except BaseException as error:  # Ctrl-C and the like: what is there must make sense to whoever reads it
        _keep(type(error).__name__, setting, journal, head)
        raise
    document = document_of(setting, journal, head, COMPLETE)
    write_json(journal.path, document)
    return document


def _measure_all(
    setting: Setting, make: Callable[..., Server], client: LoadClient, journal: Journal, log_folder: Path,
    progress: Progress,
) -> None:
    """Start the servers, and measure what the journal does not hold yet."""
    config = setting.config
    paths = {name: write_prompts(prompts, log_folder, name).resolve() for name, prompts in setting.prompts.items()}

    def load(server: Server, role: str, point: Point, num_requests: int) -> Load:
        tokens = journal.answers[role][point.scenario].tokens[:num_requests]
        return client.run(Job(server.url, role, str(paths[point.scenario]), num_requests, tokens, point.concurrency,
                              point.request_rate, config.seed), server)

    def prepare(server: Server, role: str) -> None:
        _look_at(server, role, setting, journal)
        for point in config.points:
            if point.request_rate is None:
                load(server, role, point, min(max(WARM_UP_REQUESTS, point.concurrency or 1), setting.requests(point)))

    with ServerPool(
        lambda role: make(role, alone=pool.one_at_a_time), prepare, one_at_a_time=config.one_at_a_time,
        timeout_seconds=config.start_timeout_seconds, progress=progress,
    ) as pool:
        blocks = list(plan(config, one_at_a_time=config.one_at_a_time or bool(journal.notes.get("fallback"))))
        journal.keep_blocks(blocks)
        if journal.resumed and journal.notes.get("fallback"):
            pool.one_at_a_time = True
        pool.start_all()
        if pool.fallback:
            journal.notes["fallback"] = pool.fallback
            blocks = list(plan(config, one_at_a_time=True))
        client.wait_until_ready()
        _measure(blocks, lambda role, point: load(pool.get(role), role, point, setting.requests(point)),
                 journal, progress)
        journal.notes["start_seconds"] = pool.start_seconds
        journal.notes["server_starts"] = pool.num_starts


def plan(config: BenchConfig, *, one_at_a_time: bool) -> Iterator[list[Step]]:
    """Yield the passes in order, in blocks of those that are compared with each other.

    With both servers up, the passes of a block follow each other directly. One at a time, a server does all its passes
    of a round before it is stopped.
    """
    for number in range(config.pairs):
        if one_at_a_time:
            yield [(number, place, point) for place in range(len(ROUND)) for point in config.points]
        else:
            yield from ([(number, place, point) for place in range(len(ROUND))] for point in config.points)


def _measure(
    blocks: Iterable[Sequence[Step]], measure: Callable[[str, Point], Load], journal: Journal, progress: Progress
) -> None:
    """Measure what is missing; every pass is on the disk before the next one begins."""
    steps = [step for block in blocks for step in block if not journal.has(*step)]
    with progress("measuring", len(steps), "runs") as task:
        for number, place, point in steps:
            task.note(f"round {number + 1}, {point.name}, {ROUND[place]}")
            load = measure(ROUND[place], point)
            journal.passes.append(Pass(number, place, point, load))
            if number == 0 and place < 2 and point.scenario != PREFILL:
                answers = journal.notes.setdefault("sample_answers", {}).setdefault(ROUND[place], {})
                answers.setdefault(point.scenario, list(load.texts[:NUM_SAMPLE_ANSWERS]))
            journal.save()
            task.advance()


def _look_at(server: Server, role: str, setting: Setting, journal: Journal) -> None:
    """Ask a server, once per comparison, how it tokenizes and how long its answers are."""
    if role in journal.answers:
        return
    prompts = [prompt for scenario in setting.prompts.values() for prompt in scenario]
    journal.notes.setdefault("tokenize_agreement", {})[role] = agreement_of(server, role, prompts,
                                                                            setting.encoders[role])
    wanted, most = setting.config.output_characters, setting.most_answer_tokens
    journal.answers[role] = {
        name: AnswerPlan((1,) * len(texts), (0,) * len(texts)) if name == PREFILL
        else plan_answers(server, role, texts, wanted, most_tokens=most) for name, texts in setting.prompts.items()}


def _keep(reason: str, setting: Setting, journal: Journal, head: Mapping[str, Any]) -> str:
    """Write what was measured, with what went wrong; says what is kept and how to go on."""
    total = sum(len(block) for block in plan(setting.config, one_at_a_time=False))
    journal.failures.append({"after_runs": len(journal.passes), "message": reason})
    if not journal.passes:
        return ""
    write_json(journal.path, document_of(setting, journal, head, PARTIAL))
    return f"{len(journal.passes)} of {total} runs are kept in {journal.path}; the same command goes on from there"


def _stopped(error: VocabextError, setting: Setting, journal: Journal, head: Mapping[str, Any]) -> VocabextError:
    kept = _keep(str(error).partition("\n")[0], setting, journal, head)
    return ServerError(f"{kept}: {error}") if isinstance(error, ServerError) and kept else error


def document_of(setting: Setting, journal: Journal, head: Mapping[str, Any], state: str) -> dict[str, Any]:
    """Return the content of bench.json."""
    config, notes = setting.config, journal.notes
    document = journal.to_json(state)
    runs = document.pop("runs")  # they come last
    return {
        **{name: document.pop(name) for name in ("artifact", "version", "state")},
        **head, "context_tokens": setting.context, "server_flags": notes.get("server_flags", []),
        "options": asdict(config), "method": method_of(config, notes.get("server_flags", []), notes),
        "tokenize_agreement": notes.get("tokenize_agreement", {}),
        "points": summarize(journal.passes, config.points, notes["prompt_characters"], config.target, seed=config.seed),
        "answers_below_wanted": _below(journal, config.output_characters),
        "sample_answers": _samples(setting, notes.get("sample_answers", {})),
        **document, "runs": runs,
    }


def _below(journal: Journal, wanted: int) -> dict[str, int]:
    return {role: sum(plan.num_short(wanted) for name, plan in plans.items() if name != PREFILL)
            for role, plans in journal.answers.items()}


def _samples(setting: Setting, answers: Mapping[str, Mapping[str, list[str]]]) -> list[dict[str, str]]:
    """Put an answer of each model to the same prompt side by side."""
    if set(answers) != {BASE, EXPANDED}:
        return []
    return [{"prompt": prompt, BASE: b, EXPANDED: e}
            for name in answers[BASE] if name in answers[EXPANDED]
            for prompt, b, e in zip(setting.prompts[name], answers[BASE][name], answers[EXPANDED][name], strict=False)]


def settings_of(setting: Setting, base: str, expanded: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal for passes to be compared with each other: models, prompts, options, machine."""
    hardware = about["hardware"]
    return {
        "models": {role: {"name": name, **{file: file_sha256(setting.folders[role] / file) for file in
                                           ("config.json", "tokenizer.json", "vocabext.json")}}
                   for role, name in ((BASE, base), (EXPANDED, expanded))},
        "options": asdict(setting.config), "prompts": {name: list(map(len, p)) for name, p in setting.prompts.items()},
        "versions": dict(about["versions"]), "machine": {name: hardware[name] for name in ("cpu", "cores", "gpus")},
    }


def server_flags(
    config: BenchConfig, context: int | None, device: str, needed: int, *, alone: bool = False
) -> tuple[str, ...]:
    """Return the vLLM flags of both servers: the user's, and what the measurement needs.

    Args:
        config: The options.
        context: Tokens of the models' context, None if unknown.
        device: `cpu` or `gpu`.
        needed: Tokens that the longest prompt and its answer take.
        alone: Whether nothing else runs beside the server.
    """
    flags = list(config.vllm_flags)
    if not has_flag(flags, "enable-prefix-caching"):
        flags.append("--no-enable-prefix-caching")
    if context is not None and context > needed and not has_flag(flags, "max-model-len"):
        flags += ["--max-model-len", str(needed)]  # the cache of a 128k context would not fit beside a second model
    if device == "gpu" and not alone and not config.one_at_a_time and not has_flag(flags, "gpu-memory-utilization"):
        flags += ["--gpu-memory-utilization", TWO_ON_ONE_GPU]
    if config.trust_remote_code and not has_flag(flags, "trust-remote-code"):
        flags.append("--trust-remote-code")
    return tuple(flags)


def method_of(config: BenchConfig, flags: Sequence[str], notes: Mapping[str, Any]) -> list[str]:
    """Say in sentences how it was measured."""
    caching = any(flag.replace("_", "-") == "--no-enable-prefix-caching" for flag in flags)
    if notes.get("fallback"):
        servers = f"one server at a time, because both did not start together ({notes['fallback']})"
    else:
        servers = ("one server at a time, restarted for every change" if config.one_at_a_time
                   else "both servers up all the time, one of them idle")
    lines = [
        f"{config.pairs} rounds of base, expanded, base again, after {WARM_UP_REQUESTS} or more warm-up requests per "
        f"load and server; {servers}.",
        f"Before every run: {SETTLE_SECONDS} seconds of silence if the server changes (an idle vLLM keeps a core busy "
        "for one second), and one request that is not counted.",
        f"Both models get the same prompts, as text, cut from held-out documents{_counted(notes.get('documents'))}.",
        f"Prefill: prompts of up to {config.prompt_tokens or DEFAULT_PROMPT_TOKENS} base tokens, as the context "
        "allows; one output token.",
        f"Decode: prompts of up to {config.prompt_characters} characters. Mixed: up to {config.passage_characters} "
        f"characters of passages of other documents before such a prompt, as the context allows."
        f"{_spans((notes.get('prompt_tokens') or {}).get(BASE))}",
        f"Answers are equal in characters, not in tokens: each server was asked beforehand how many tokens its greedy "
        f"answer to each prompt needs for {config.output_characters} characters, and got that many as max_tokens. "
        "The end-of-text token is ignored.",
        "Load from vLLM's own benchmark client; requests at a rate arrive at random (Poisson) moments, the same "
        "for both models.",
        f"Prefix caching {'off' if caching else 'as the flags say'}.",
        "Speed-up: for each request, the geometric mean of its two base times over its expanded time; median over the "
        "requests of all rounds. 95 % intervals: bootstrap over rounds and requests. Noise floor: the interval of base "
        "over base again. 'faster' or 'slower' only if the whole interval lies outside the noise floor, from five "
        "rounds on.",
        "The noise floor compares a server with itself: a difference between two starts of the same model is not "
        "in it.",
    ]
    if any(config.target.values()):
        limits = [f"{name.replace('_', ' ')} at most {limit:g}" for name, limit in config.target.items() if limit]
        lines.append(f"Goodput counts requests with {' and '.join(limits)}.")
    return lines


def _counted(documents: Mapping[str, int] | None) -> str:
    if not documents:
        return ""
    cut = (f" (the first {MAX_CORPUS_CHARACTERS:,} characters of the corpus)"
           if documents["characters"] > MAX_CORPUS_CHARACTERS else "")
    return f": {documents['different']:,} different ones of {documents['read']:,}{cut}"


def _spans(tokens: Mapping[str, Sequence[int]] | None) -> str:
    """Say how long prompts are in base tokens, which is what the context is counted in."""
    spans = (f"{name} {min(counts):,} to {max(counts):,}" for name, counts in (tokens or {}).items())
    return f" In base tokens: {', '.join(spans)}." if tokens else ""


def agreement_of(server: Server, model: str, prompts: Sequence[str], encoder: Encoder) -> dict[str, int]:
    """Count the prompts that the server tokenizes exactly as the folder's tokenizer (`encoder`) does."""
    agreeing = 0
    for prompt in prompts:
        answer = server.ask("/tokenize", {"model": model, "prompt": prompt, "add_special_tokens": False})
        agreeing += answer["tokens"] == encoder.encode(prompt)
    return {"prompts": len(prompts), "agreeing": agreeing}


def _context(folders: Iterable[Path], flags: Sequence[str]) -> int | None:
    """Return the context that both servers will have: the models', or less if the flags say so."""
    asked = flag_value(flags, "max-model-len")
    known = [context_length(folder) for folder in folders]
    limits = [*filter(None, known), *([int(asked)] if asked and asked.isdigit() else [])]
    return min(limits, default=None)


def _texts(documents: Iterable[Document]) -> list[str]:
    """Return the documents' texts up to `MAX_CORPUS_CHARACTERS`, the last one whole."""
    texts, characters = [], 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if characters > MAX_CORPUS_CHARACTERS:
            break
    return texts


def _described(texts: Sequence[str]) -> dict[str, int]:
    return {"read": len(texts), "different": len(set(map(str.strip, texts))), "characters": sum(map(len, texts))}
