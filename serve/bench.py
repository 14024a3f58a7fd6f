"""Measure base and expanded on the same texts, in turn, under vLLM's own benchmark client.

Two loads, because they are limited by different things:

    prefill   a long prompt, one output token: what it costs to read a text
    decode    a short prompt, a long answer: what it costs to write text

A round is base, expanded, base again. The unit is seconds per *text* or per output *character*; tokens
per second falls when a tokenizer improves, so it appears nowhere. How a verdict comes about: `compare.py`.
"""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.client import Job, Load, LoadClient, write_prompts
from serve.compare import Comparison, Series, compare
from serve.encoder import Encoder, load_encoder
from serve.engine import (
    START_TIMEOUT_SECONDS,
    Server,
    has_flag,
    open_url,
    require_vllm,
    vllm_device,
    vllm_server,
    wait_until_ready,
)
from serve.provenance import provenance
from vocabext.checkpoint import read_json, resolve_model
from vocabext.corpus import read_documents
from vocabext.errors import CorpusError, ServerError, UsageError
from vocabext.progress import Progress, no_progress
from vocabext.records import Document

FORMAT_VERSION = 1
BASE, EXPANDED = "base", "expanded"
ROUND = (BASE, EXPANDED, BASE)
PREFILL, DECODE = "prefill", "decode"
SCENARIOS = (PREFILL, DECODE)
MAX_CORPUS_CHARACTERS = 50_000_000
CONTEXT_MARGIN_TOKENS = 16  # for the tokens that frame a prompt
WARM_UP_REQUESTS = 2
SETTLE_SECONDS = 1.2  # vLLM's worker polls for one second after its last request, on the core the other one needs
TWO_ON_ONE_GPU = "0.42"  # share of a GPU's memory for each of two servers; vLLM's own default is 0.9


@dataclass(frozen=True)
class BenchConfig:
    """Options of `serve bench`."""

    # Rounds of base, expanded, base. Fewer than five give no interval worth the name.
    pairs: int = 5
    # Prompts of the prefill load.
    prefill_texts: int = 6
    # Length of a prefill prompt in *base* tokens; the model's context limits it further.
    prompt_tokens: int = 2032
    # Prompts of the decode load.
    decode_texts: int = 6
    # Length of a decode prompt in characters.
    prompt_characters: int = 200
    # Tokens of every answer of the decode load.
    output_tokens: int = 64
    # Requests in flight at once. With 1, the time of a request is the time of the machine.
    concurrency: int = 1
    # Run one server at a time, for machines that do not hold both in memory.
    one_at_a_time: bool = False
    start_timeout_seconds: float = START_TIMEOUT_SECONDS
    seed: int = 0
    trust_remote_code: bool = False
    # Further flags for both servers.
    vllm_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("pairs", "prefill_texts", "prompt_tokens", "decode_texts", "prompt_characters", "output_tokens",
                     "concurrency"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Prompts:
    """The texts of both loads, the same for both models.

    Attributes:
        prefill: Long prompts.
        decode: Short prompts.
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...]

    def of(self, scenario: str) -> tuple[str, ...]:
        """Return the prompts of one load."""
        return self.prefill if scenario == PREFILL else self.decode


@dataclass(frozen=True)
class Run:
    """One run of one load on one server.

    Attributes:
        round: Counted from 0.
        place: 0, 1, 2: base, expanded, base again.
        scenario: `prefill` or `decode`.
        load: What was measured.
    """

    round: int
    place: int
    scenario: str
    load: Load


def run_bench(
    base: str, expanded: str, corpus: Sequence[str], *, config: BenchConfig, text_field: str = "text",
    log_folder: Path, progress: Progress = no_progress,
) -> dict[str, Any]:
    """Start both servers, measure them in turn, and stop them.

    Args:
        base: Base model, folder or hub id.
        expanded: Expanded model, folder or hub id.
        corpus: Held-out documents, the prompts' source.
        config: The options.
        text_field: Field with the text in `.jsonl` and `.parquet`.
        log_folder: An existing folder for the logs of the servers and of the load generator.
        progress: Told of every run.

    Returns:
        The content of bench.json.

    Raises:
        MissingExtraError: If vLLM is not installed.
        ServerError: If a server or the load generator does not start, or dies.
        CorpusError: If the corpus holds too little text.
    """
    require_vllm()
    about = provenance()
    documents = read_documents(corpus, text_field=text_field)  # a wrong path should not wait for a download
    folders = {BASE: resolve_model(base), EXPANDED: resolve_model(expanded)}
    texts = _texts(documents)
    encoders = {role: load_encoder(folder, trust_remote_code=config.trust_remote_code)
                for role, folder in folders.items()}
    context = min(filter(None, (context_length(folder) for folder in folders.values())), default=None)
    prompts = build_prompts(texts, encoders[BASE], config, context)
    flags = server_flags(config, context, vllm_device())

    def make(role: str) -> Server:
        return vllm_server(folders[role], log_folder / f"{role}.log", name=f"the {role} server",
                           served_name=role, flags=flags)

    with ExitStack() as stack:
        client = stack.enter_context(LoadClient(log_folder / "client.log"))
        paths = {scenario: write_prompts(prompts.of(scenario), log_folder, scenario) for scenario in SCENARIOS}

        def load(server: Server, role: str, scenario: str, num_requests: int) -> Load:
            tokens = 1 if scenario == PREFILL else config.output_tokens
            path = str(paths[scenario].resolve())
            job = Job(server.url, role, path, num_requests, tokens, config.concurrency)
            return client.run(job, server)

        def warm_up(server: Server, role: str) -> None:
            for scenario in SCENARIOS:
                load(server, role, scenario, min(WARM_UP_REQUESTS, len(prompts.of(scenario))))

        pool = stack.enter_context(ServerPool(make, config, warm_up, progress))
        pool.start_all()
        client.wait_until_ready()
        agreement = {role: agreement_of(pool.get(role), role, (*prompts.prefill, *prompts.decode), encoders[role])
                     for role in (EXPANDED, BASE)}

        def measure(role: str, scenario: str) -> Load:
            return load(pool.get(role), role, scenario, len(prompts.of(scenario)))

        runs = measure_rounds(measure, config, progress)
    document = summarize(runs, prompts, config)
    return {
        "artifact": "bench", "version": FORMAT_VERSION, BASE: base, EXPANDED: expanded, "corpus": list(corpus),
        "device": vllm_device(), "server_flags": list(flags), "context_tokens": context,
        "options": asdict(config), "method": method_of(config, flags),
        "tokenize_agreement": agreement, "start_seconds": pool.start_seconds, **document, "provenance": about,
    }


class ServerPool(AbstractContextManager["ServerPool"]):
    """The two servers: both up, or, where memory does not hold two, one at a time."""

    def __init__(self, make: Callable[[str], Server], config: BenchConfig, warm_up: Callable[[Server, str], None],
                 progress: Progress = no_progress) -> None:
        """Prepare; nothing runs yet.

        Args:
            make: Describes the server of a role.
            config: The options.
            warm_up: Called once with every server that became ready.
            progress: Told about the waiting.
        """
        self._make, self._config, self._warm_up, self._progress = make, config, warm_up, progress
        self._servers: dict[str, Server] = {}
        self._warm: set[str] = set()
        self._last_role: str | None = None
        self.start_seconds = 0.0

    def start_all(self) -> None:
        """Start both servers at the same time, unless they are to run one at a time."""
        if not self._config.one_at_a_time:
            self._start((BASE, EXPANDED))

    def get(self, role: str) -> Server:
        """Return a server that is ready and warm."""
        if role not in self._servers:
            self._stop_all()
            self._start((role,))
        server = self._servers[role]
        if self._last_role not in (None, role):
            time.sleep(SETTLE_SECONDS)
        self._last_role = role
        if role not in self._warm:
            self._warm.add(role)
            self._warm_up(server, role)
        return server

    def __exit__(self, *_: object) -> None:
        """Stop what is running."""
        self._stop_all()

    def _start(self, roles: Sequence[str]) -> None:
        for role in roles:  # one after the other, so that they do not pick the same port
            server = self._servers[role] = self._make(role)
            server.start()
        timeout = self._config.start_timeout_seconds
        try:
            self.start_seconds += wait_until_ready(
                list(self._servers.values()), timeout_seconds=timeout, progress=self._progress
            )
        except ServerError as error:
            head, _, tail = str(error).partition("\n")
            hint = "; if memory does not hold both models, pass --one-at-a-time" if len(roles) > 1 else ""
            raise ServerError(f"{head}\n{tail}{hint}") from None

    def _stop_all(self) -> None:
        while self._servers:
            role, server = self._servers.popitem()
            self._warm.discard(role)
            server.stop()


def plan(config: BenchConfig) -> Iterator[tuple[int, int, str]]:
    """Yield (round, place in the round, scenario) of every run, in order.

    With both servers up, the runs that are compared follow each other directly. One at a time, a
    server does everything it has to before it is stopped.
    """
    for number in range(config.pairs):
        if config.one_at_a_time:
            yield from ((number, place, scenario) for place in range(len(ROUND)) for scenario in SCENARIOS)
        else:
            yield from ((number, place, scenario) for scenario in SCENARIOS for place in range(len(ROUND)))


def measure_rounds(
    measure: Callable[[str, str], Load], config: BenchConfig, progress: Progress = no_progress
) -> list[Run]:
    """Run every load of every round.

    Args:
        measure: Runs one load: role and scenario in, measurements out.
        config: The options.
        progress: Told of every run.
    """
    runs = []
    steps = list(plan(config))
    with progress("measuring", len(steps), "runs") as task:
        for number, place, scenario in steps:
            runs.append(Run(number, place, scenario, measure(ROUND[place], scenario)))
            task.advance()
    return runs


def summarize(runs: Sequence[Run], prompts: Prompts, config: BenchConfig) -> dict[str, Any]:
    """Turn the runs into medians, intervals and verdicts, and keep the raw numbers beside them."""
    scenarios = []
    for scenario in SCENARIOS:
        loads = [_loads(runs, scenario, place) for place in range(len(ROUND))]
        unit = "text" if scenario == PREFILL else "1000 output characters"
        main = f"seconds_per_{unit.replace(' ', '_')}"
        comparisons = {
            main: _compare(loads, "request_seconds", per_character=scenario == DECODE, seed=config.seed),
            "ttft_seconds": _compare(loads, "ttft_seconds", per_character=False, seed=config.seed),
        }
        scenarios.append({
            "name": scenario,
            "main_metric": main,
            "requests_per_run": len(prompts.of(scenario)),
            "prompt_characters": sum(map(len, prompts.of(scenario))),
            "output_tokens_per_request": 1 if scenario == PREFILL else config.output_tokens,
            BASE: _totals([*loads[0], *loads[2]]),
            EXPANDED: _totals(loads[1]),
            "metrics": {name: comparison.to_json() for name, comparison in comparisons.items()},
        })
    samples = [{"prompt": p, BASE: b, EXPANDED: e} for p, b, e in zip(
        prompts.decode, _loads(runs, DECODE, 0)[0].texts, _loads(runs, DECODE, 1)[0].texts, strict=True)]
    return {"scenarios": scenarios, "sample_answers": samples[:2], "runs": [_run_json(run) for run in runs]}


def build_prompts(texts: Iterable[str], encoder: Encoder, config: BenchConfig, context: int | None) -> Prompts:
    """Cut the prompts of both loads out of held-out texts.

    Prefill prompts are long stretches of text (documents joined by a blank line) that end at a space
    just before they would exceed the limit in *base* tokens. Decode prompts are the beginnings of
    documents.

    Args:
        texts: The documents.
        encoder: The base model's tokenizer.
        config: The options.
        context: The model's context in tokens, None if unknown.

    Raises:
        CorpusError: If there is no text for a prompt.
        UsageError: If an answer does not fit into the context.
    """
    documents = [text.strip() for text in texts if text.strip()]
    if not documents:
        raise CorpusError("the corpus holds no text to make prompts from; pass held-out documents as --corpus")
    random.Random(config.seed).shuffle(documents)
    room = (context or 10**9) - CONTEXT_MARGIN_TOKENS
    if config.output_tokens > room // 2:
        raise UsageError(f"--output-tokens {config.output_tokens} leaves too little of the model's context of "
                         f"{context} tokens for the prompt; use at most {room // 2}")
    limit = min(config.prompt_tokens, room)
    prefill = _long_prompts("\n\n".join(documents), encoder, limit, config.prefill_texts)
    openings = [d for d in documents if len(d) >= config.prompt_characters] or documents
    decode = [_cut_at_space(d, config.prompt_characters) for d in openings[: config.decode_texts]]
    decode = [_fit(d, encoder, room - config.output_tokens) for d in decode]
    return Prompts(tuple(prefill), tuple(decode))


def server_flags(config: BenchConfig, context: int | None, device: str) -> tuple[str, ...]:
    """Return the vLLM flags of both servers: the user's, and what the measurement needs."""
    flags = list(config.vllm_flags)
    if not has_flag(flags, "enable-prefix-caching"):
        flags.append("--no-enable-prefix-caching")
    needed = config.prompt_tokens + config.output_tokens + 4 * CONTEXT_MARGIN_TOKENS
    if context is not None and context > needed and not has_flag(flags, "max-model-len"):
        flags += ["--max-model-len", str(needed)]  # the cache of a 128k context would not fit beside a second model
    if device == "gpu" and not config.one_at_a_time and not has_flag(flags, "gpu-memory-utilization"):
        flags += ["--gpu-memory-utilization", TWO_ON_ONE_GPU]
    if config.trust_remote_code and not has_flag(flags, "trust-remote-code"):
        flags.append("--trust-remote-code")
    return tuple(flags)


def method_of(config: BenchConfig, flags: Sequence[str]) -> list[str]:
    """Say in sentences how it was measured."""
    caching = any(flag.replace("_", "-") == "--no-enable-prefix-caching" for flag in flags)
    servers = ("one server at a time, restarted for every change" if config.one_at_a_time
               else "both servers up all the time, one of them idle")
    return [
        f"{config.pairs} rounds of base, expanded, base again, after {WARM_UP_REQUESTS} warm-up requests per load and "
        f"server; {servers}.",
        f"Before every run: {SETTLE_SECONDS} seconds of silence if the server changes (an idle vLLM keeps a core busy "
        "for one second), and one request that is not counted.",
        "Both models get the same prompts, cut from held-out documents, as text.",
        f"Prefill: prompts of up to {config.prompt_tokens} base tokens, as the context allows; one output token.",
        f"Decode: prompts of {config.prompt_characters} characters, {config.output_tokens} output tokens, greedy, the "
        "end-of-text token ignored; compared by seconds per output character, because the tokens differ.",
        f"Load from vLLM's own benchmark client, {config.concurrency} request(s) in flight.",
        f"Prefix caching {'off' if caching else 'as the flags say'}.",
        "Speed-up: for each request, the geometric mean of its two base times over its expanded time; median over the "
        "requests of all rounds. 95 % intervals: bootstrap over rounds and requests. Noise floor: the interval of base "
        "over base again. "
        "'faster' or 'slower' only if the whole interval lies outside the noise floor.",
        "The noise floor compares a server with itself: a difference between two starts of the same model is not "
        "in it.",
    ]


def agreement_of(server: Server, model: str, prompts: Sequence[str], encoder: Encoder) -> dict[str, int]:
    """Count the prompts that the server tokenizes exactly as the folder's tokenizer does.

    Args:
        server: A server that is ready.
        model: The model's name there.
        prompts: The texts.
        encoder: The folder's tokenizer.
    """
    agreeing = 0
    for prompt in prompts:
        body = json.dumps({"model": model, "prompt": prompt, "add_special_tokens": False}).encode()
        try:
            with open_url(f"{server.url}/tokenize", body=body) as response:
                agreeing += json.load(response)["tokens"] == encoder.encode(prompt)
        except OSError as error:
            server.check_alive()
            raise server.failure(f"{server.name} did not answer /tokenize ({error})") from None
    return {"prompts": len(prompts), "agreeing": agreeing}


def context_length(folder: Path) -> int | None:
    """Return how many tokens a model's context holds, None if its config does not say."""
    config: Mapping[str, Any] = read_json(folder / "config.json")
    config = config.get("text_config") or config
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(config.get(name), int):
            return int(config[name])
    return None


def _texts(documents: Iterable[Document]) -> list[str]:
    texts, characters = [], 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if characters > MAX_CORPUS_CHARACTERS:
            break
    return texts


def _long_prompts(text: str, encoder: Encoder, limit: int, count: int) -> list[str]:
    prompts: list[str] = []
    start = 0
    while len(prompts) < count and start < len(text):
        prompt = _fit(text[start : start + 12 * limit], encoder, limit)
        start += max(1, len(prompt))
        if prompts and len(prompt) < len(prompts[0]) // 2:
            break  # the rest of the corpus: too short to be a long prompt
        if prompt.strip():
            prompts.append(prompt)
    return prompts


def _fit(text: str, encoder: Encoder, limit: int) -> str:
    """Return the beginning of a text that has at most `limit` tokens, cut at a space if possible."""
    while (count := len(encoder.encode(text))) > limit:
        text = _cut_at_space(text, min(len(text) - 1, int(len(text) * limit / count)))
    return text


def _cut_at_space(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    space = text.rfind(" ", 0, length + 1)
    return text[: space if space > length * 0.8 else length].rstrip() or text[:length]


def _loads(runs: Sequence[Run], scenario: str, place: int) -> list[Load]:
    return [run.load for run in sorted(runs, key=lambda r: r.round) if (run.scenario, run.place) == (scenario, place)]


def _compare(loads: Sequence[Sequence[Load]], field: str, *, per_character: bool, seed: int) -> Comparison:
    series = []
    for place in loads:
        seconds = np.array([getattr(load, field) for load in place], dtype=float)  # None becomes NaN
        amount = np.array([load.output_characters for load in place], dtype=float) / 1000
        series.append(Series(seconds, amount if per_character else np.ones_like(seconds)))
    return compare(series[0], series[1], series[2], seed=seed)


def _totals(loads: Sequence[Load]) -> dict[str, Any]:
    errors = list(dict.fromkeys(error for load in loads for error in load.errors))
    return {
        "requests": sum(len(load.request_seconds) for load in loads),
        "failed_requests": sum(load.num_failed for load in loads),
        "errors": errors[:5],
        "prompt_tokens_per_run": sum(loads[0].prompt_tokens),
        "output_tokens_per_run": sum(loads[0].output_tokens),
        "output_characters_per_run": sum(loads[0].output_characters),
    }


def _run_json(run: Run) -> dict[str, Any]:
    values = asdict(run.load)
    values.pop("texts")
    role = ("base", "expanded", "base again")[run.place]
    return {"round": run.round + 1, "role": role, "scenario": run.scenario, **values}
