"""The load: vLLM's own benchmark client, in a process of its own.

Importing vLLM takes many seconds and its client writes to stdout, so one child imports it once and then takes jobs:
one JSON object per line on stdin, one per line back on a stdout that nobody else writes to.

The client gets no tokenizer: a prompt is text, and the server counts its tokens. So the client counts nothing, and
nothing differently for base and expanded.

Run as a module, this file is the child.
"""

import asyncio
import json
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from vocabext.errors import ServerError
from vocabext.serve.engine import Child, Server, find_this_package, server_environment

START_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Job:
    """One pass, as the load generator gets it.

    Attributes:
        url: The server.
        model: The model's name there.
        prompts_path: JSON Lines with a field `prompt`; requests are sent in this order.
        num_requests: How many of the prompts to send.
        output_tokens: How many tokens the answer to each prompt has; the end-of-text token is ignored.
        concurrency: How many requests are in flight at once; None for no limit.
        request_rate: How many requests arrive per second, at random moments; None sends them at once.
        seed: Seed of the moments of arrival.
    """

    url: str
    model: str
    prompts_path: str
    num_requests: int
    output_tokens: tuple[int, ...]
    concurrency: int | None = 1
    request_rate: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Load:
    """What one pass measured, request by request, in the order of the prompts.

    Attributes:
        duration_seconds: Wall time of the pass.
        request_seconds: From sending a request to its last token; None where it failed.
        ttft_seconds: From sending a request to its first token; None where it failed.
        output_characters: Characters of each answer.
        prompt_tokens: Tokens of each prompt, as the server counted them.
        output_tokens: Tokens of each answer, as the server counted them.
        errors: What failed, each message once, at most ten.
        texts: The answers.
    """

    duration_seconds: float
    request_seconds: tuple[float | None, ...]
    ttft_seconds: tuple[float | None, ...]
    output_characters: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    errors: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def num_failed(self) -> int:
        """How many requests failed."""
        return sum(seconds is None for seconds in self.request_seconds)


class LoadClient(Child):
    """The child that runs vLLM's benchmark client. A context manager."""

    name = "the load generator"

    def __init__(self, log_path: Path) -> None:
        """Describe the child; `log_path` receives what vLLM's client prints."""
        environment = server_environment("cpu")
        find_this_package(environment)
        super().__init__([sys.executable, "-m", "vocabext.serve.bench.client"], log_path, environment=environment,
                         piped=True)
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._is_ready = False

    def start(self) -> None:
        """Start the child; its import of vLLM goes on in the background."""
        super().start()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_until_ready(self) -> None:
        """Wait until the child has imported vLLM.

        Raises:
            ServerError: If the child dies instead.
        """
        if not self._is_ready:
            self._answer(START_TIMEOUT_SECONDS, ())
            self._is_ready = True

    def run(self, job: Job, server: Server, *, timeout_seconds: float = 1800.0) -> Load:
        """Send the requests of one pass to `server` (at `job.url`) and wait for all answers.

        Raises:
            ServerError: If the child or the server dies, every request failed, or the time is up.
        """
        assert self.process.stdin is not None
        self.wait_until_ready()  # else its first answer would be taken for the job's
        try:
            self.process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.failure(f"{self.name} stopped") from None
        result = self._answer(timeout_seconds, (server,))
        if "failure" in result:
            server.check_alive()
            raise ServerError(f"vLLM's benchmark client failed: {result['failure']}; the log is {self.log_path}")
        load = load_from(result)
        server.check_alive()
        if load.num_failed == len(load.request_seconds):
            raise server.failure(f"every request to {server.name} failed ({'; '.join(load.errors)})")
        return load

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line.decode())
        self._answers.put(None)

    def _answer(self, timeout_seconds: float, servers: Sequence[Server]) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            try:
                line = self._answers.get(timeout=0.5)
            except queue.Empty:
                # If a server dies and closes its connections, its requests fail, and the client answers. If it dies
                # and does not close them, the client waits for ever.
                for server in servers:
                    server.check_alive()
                continue
            if line is None:
                raise self.failure(f"{self.name} stopped")
            answer: dict[str, Any] = json.loads(line)
            return answer
        raise self.failure(f"{self.name} did not answer within {timeout_seconds:.0f} seconds")


def write_prompts(prompts: Sequence[str], folder: Path, name: str) -> Path:
    """Write prompts in the form that vLLM's custom dataset reads."""
    path = folder / f"{name}.jsonl"
    # `output_tokens` is not read without a tokenizer; the column keeps the file valid for `vllm bench serve`.
    lines = [json.dumps({"prompt": prompt, "output_tokens": 1}) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def load_from(result: dict[str, Any]) -> Load:
    """Take what matters from the result of vLLM's benchmark client."""
    # A request succeeded if it has an answer and no error; vLLM leaves the latency of others at 0.
    failed = [bool(error) or latency <= 0
              for error, latency in zip(result["errors"], result["latencies"], strict=True)]
    errors = dict.fromkeys(_last_line(error) for error in compress(result["errors"], failed))

    def kept(values: Sequence[float]) -> tuple[float | None, ...]:
        return tuple(None if bad else float(value) for value, bad in zip(values, failed, strict=True))

    return Load(
        duration_seconds=float(result["duration"]),
        request_seconds=kept(result["latencies"]),
        ttft_seconds=kept(result["ttfts"]),
        output_characters=tuple(len(text) for text in result["generated_texts"]),
        prompt_tokens=tuple(int(n) for n in result["input_lens"]),
        output_tokens=tuple(int(n) for n in result["output_lens"]),
        errors=tuple(errors)[:10],
        texts=tuple(result["generated_texts"]),
    )


def arguments(job: Job) -> list[str]:
    """Return the command line of `vllm bench serve` that a job stands for."""
    in_flight = [] if job.concurrency is None else ["--max-concurrency", str(job.concurrency)]
    rate = [] if job.request_rate is None else ["--request-rate", str(job.request_rate)]
    return [
        "--backend", "openai", "--base-url", job.url, "--endpoint", "/v1/completions",
        "--model", job.model, "--served-model-name", job.model,
        "--dataset-name", "custom", "--dataset-path", job.prompts_path, "--disable-shuffle", "--skip-chat-template",
        "--custom-output-len", "-1", "--num-prompts", str(job.num_requests), "--no-oversample",
        *in_flight, *rate, "--seed", str(job.seed), "--num-warmups", "1", "--skip-tokenizer-init", "--disable-tqdm",
        "--ignore-eos", "--temperature", "0", "--save-detailed",
    ]


def _last_line(text: str) -> str:
    return (text or "").strip().rpartition("\n")[2].strip()[:300] or "no answer"


def _serve_jobs() -> None:
    """Be the child: import vLLM, then run one job per line of stdin."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints to stdout from here on prints to the log
    from vllm.benchmarks import serve as vllm_client
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    vllm_client.add_cli_args(parser)
    get_samples = vllm_client.get_samples

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"ready": True})
    fields = ("duration", "latencies", "ttfts", "generated_texts", "input_lens", "output_lens", "errors")
    for line in sys.stdin:
        try:
            job = Job(**json.loads(line))
            # Without a tokenizer vLLM's client has one output length for all requests; ours are one per prompt.
            vllm_client.get_samples = lambda *given, lengths=job.output_tokens: [
                replace(request, request_overrides={"max_tokens": length, "min_tokens": length})
                for request, length in zip(get_samples(*given), lengths, strict=True)]
            result = asyncio.run(vllm_client.main_async(parser.parse_args(arguments(job))))
            answer({name: result[name] for name in fields})
        except (Exception, SystemExit) as error:
            answer({"failure": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    os.chdir(tempfile.gettempdir())  # vLLM's client may leave files where it runs
    _serve_jobs()
