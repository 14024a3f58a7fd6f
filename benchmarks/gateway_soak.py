"""Swap under load: 32 clients stream for ten minutes while the gateway swaps every six seconds.

    python benchmarks/gateway_soak.py --minutes 10 [--one-engine] [--json benchmarks/gateway_soak.json]

Real vLLM engines serve a small stories model and its expansion. Every answer is checked against what one arm
alone must have said (`faults_of`): one answer, one arm, nothing missing, nothing twice. Exit code 3 if an answer
failed the check, and 1 if less than one answer per swap was seen.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from gateway_models import STORIES, make_pair

from vocabext.checkpoint.manifest import read_manifest
from vocabext.serve.engine import Server, vllm_server, wait_until_ready
from vocabext.serve.gateway.keeper import ONE_ENGINE_FLAGS
from vocabext.serve.gateway.observe import events_of
from vocabext.serve.provenance import provenance
from vocabext.tokenizer import load_hf_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--max-num-seqs", "64", "--dtype", "float32", "--max-model-len", "384")


@dataclass
class Answer:
    """A streamed answer, as a client got it.

    Attributes:
        status: HTTP status; 0 if the connection failed.
        arm: Who answered, by the gateway's header.
        events: The events' data, in order.
        error: What failed.
        prompt: What was asked.
        max_tokens: How many tokens were asked for; the end-of-text token was to be ignored.
        seconds: How long it took.
    """

    status: int
    arm: str
    events: list[str]
    prompt: str
    max_tokens: int
    error: str = ""
    seconds: float = 0.0


@dataclass
class Known:
    """What is known of an arm without asking it.

    Attributes:
        model: The name that its engine gives itself.
        tokenizer: Its tokenizer, as transformers loads it.
        num_ids: One more than the last id it may write.
    """

    model: str
    tokenizer: Any
    num_ids: int


def faults_of(answer: Answer, known: dict[str, Known]) -> list[str]:
    """Return what is wrong with an answer; nothing if it can only have come from one arm, whole."""
    if answer.error or answer.status != 200:
        return [f"failed: status {answer.status} {answer.error}".strip()]
    if answer.arm not in known:
        return [f"no arm: {answer.arm!r}"]
    arm, faults = known[answer.arm], []
    if not answer.events or answer.events[-1] != "[DONE]":
        faults.append("cut: there is no [DONE]")
    if "[DONE]" in answer.events[:-1]:
        faults.append("mixed: something follows [DONE]")
    documents = [json.loads(data) for data in answer.events if data != "[DONE]"]
    if errors := [document["error"] for document in documents if "error" in document]:
        return [*faults, f"failed: {errors[0]}"]
    for name in ("id", "model"):
        if len(values := {document.get(name) for document in documents}) > 1:
            faults.append(f"mixed: {len(values)} different values of {name}")
    if documents and documents[0].get("model") != arm.model:
        faults.append(f"mixed: the answer of {documents[0].get('model')} came as the {answer.arm} arm's")
    choices = [choice for document in documents for choice in document.get("choices") or ()]
    prompt_ids = [choice["prompt_token_ids"] for choice in choices if choice.get("prompt_token_ids")]
    expected = arm.tokenizer.encode(answer.prompt)
    if prompt_ids != [expected]:
        faults.append(f"mixed: the prompt was read as {prompt_ids}, the {answer.arm} arm reads {expected}")
    ids = [token_id for choice in choices for token_id in choice.get("token_ids") or ()]
    text = "".join(choice.get("text") or "" for choice in choices)
    if len(ids) != answer.max_tokens:
        faults.append(f"{'cut' if len(ids) < answer.max_tokens else 'duplicated'}: {len(ids)} tokens came, "
                      f"{answer.max_tokens} were asked for")
    if any(token_id >= arm.num_ids for token_id in ids):
        faults.append(f"mixed: the {answer.arm} arm wrote the id {max(ids)}")
    usage = next((document["usage"] for document in reversed(documents) if document.get("usage")), {})
    if usage.get("completion_tokens") != len(ids):
        faults.append(f"cut or duplicated: {len(ids)} tokens came, the engine counted {usage.get('completion_tokens')}")
    before = arm.tokenizer.decode(expected, skip_special_tokens=True)
    whole = arm.tokenizer.decode([*expected, *ids], skip_special_tokens=True)[len(before):]
    if not _same_text(text, whole):
        faults.append(f"mixed: the text is {text!r}, the ids say {whole!r}")
    return faults


def _same_text(text: str, whole: str) -> bool:
    """Compare, but for characters that are not complete at the end: an engine holds these back."""
    return text.rstrip("�") == whole.rstrip("�")


@dataclass
class Tally:
    """What the clients saw."""

    answers: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    across: int = 0  # answers during which the gateway swapped


async def client(url: str, until: float, known: dict[str, Known], tally: Tally, swaps: list[float]) -> None:
    """Ask one question after the other."""
    async with aiohttp.ClientSession(trust_env=False) as session:
        while time.monotonic() < until:
            answer = await ask(session, url, random.choice(STORIES), random.randint(24, 96))
            tally.answers[answer.arm or "none"] += 1
            tally.seconds.append(answer.seconds)
            ended = time.monotonic()
            tally.across += any(ended - answer.seconds < swap < ended for swap in swaps[-3:])
            for fault in faults_of(answer, known):
                tally.faults[fault.partition(":")[0]] += 1
                if len(tally.examples) < 20:
                    tally.examples.append(fault[:500])


async def ask(session: aiohttp.ClientSession, url: str, prompt: str, max_tokens: int) -> Answer:
    """Ask for a stream, and read it to its end."""
    body = {"model": "stories", "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True,
            "return_token_ids": True, "temperature": 1.0, "stream_options": {"include_usage": True}}
    answer, began = Answer(0, "", [], prompt, max_tokens), time.monotonic()
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            answer.status, answer.arm = response.status, response.headers.get("x-vocabext-arm", "")
            stream = (await response.read()).decode("utf-8")  # strict: a cut character is an error
            if response.status != 200:
                answer.error = stream[:300]
            answer.events = [data.decode() for _, data in events_of([(0.0, stream.encode())])]
    except (aiohttp.ClientError, OSError, UnicodeDecodeError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.monotonic() - began
    return answer


async def swapper(state: Path, until: float, every: float, swaps: list[float]) -> None:
    """Swap between all on base, all on expanded, and shares."""
    document = json.loads(state.read_text())
    orders = [{"to": "expanded"}, {"to": "base"}, {"to": "expanded", "percent": 50}, {"rollback": True}]
    async with aiohttp.ClientSession(trust_env=False, headers={"x-vocabext-token": document["token"]}) as session:
        while time.monotonic() + every < until:
            await asyncio.sleep(every)
            async with session.post(f"{document['admin_url']}/swap", json=orders[len(swaps) % 4]) as response:
                assert response.status == 200, await response.text()
            swaps.append(time.monotonic())


def main() -> int:
    """Run the soak; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--swap-seconds", type=float, default=6.0)
    parser.add_argument("--one-engine", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gateway-soak-") as name, ExitStack() as stack:
        result = soak(Path(name), options, stack)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if result["answers"] < result["swaps"]:
        return 1
    return 3 if result["faults"] else 0


def soak(folder: Path, options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Start everything, run it, and count."""
    base, expanded = make_pair(folder)
    servers = engines(folder, {"expanded": expanded} if options.one_engine else {"base": base, "expanded": expanded},
                      ONE_ENGINE_FLAGS if options.one_engine else ())
    for server in servers.values():
        stack.enter_context(server)
    wait_until_ready(list(servers.values()))
    manifest = read_manifest(expanded)
    known = {"base": Known("expanded" if options.one_engine else "base", load_hf_tokenizer(base),
                           manifest.first_new_id),
             "expanded": Known("expanded", load_hf_tokenizer(expanded),
                               # rows that pad the matrix have no token, and an engine may sample them all the same
                               json.loads((expanded / "config.json").read_text())["vocab_size"])}
    arms = ([str(base), f"{expanded}@{servers['expanded'].url}", "--one-engine"] if options.one_engine
            else [servers["base"].url, servers["expanded"].url])
    url, process = start_gateway(folder, arms, "--unverified")  # the pair was made a moment ago
    try:
        until, tally, swaps = time.monotonic() + 60 * options.minutes, Tally(), []

        async def everything() -> None:
            await asyncio.gather(swapper(folder / "state.json", until, options.swap_seconds, swaps),
                                 *(client(url, until, known, tally, swaps) for _ in range(options.clients)))

        asyncio.run(everything())
        open_now = process_connections(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)
    ordered = sorted(tally.seconds)
    return {"artifact": "gateway-soak", "version": 1, "minutes": options.minutes, "clients": options.clients,
            "swap_seconds": options.swap_seconds, "one_engine": options.one_engine, "swaps": len(swaps),
            "answers": sum(tally.answers.values()), "answers_by_arm": dict(tally.answers),
            "answers_across_a_swap": tally.across, "faults": dict(tally.faults), "examples": tally.examples,
            "median_seconds": round(ordered[len(ordered) // 2], 3), "connections_left": open_now,
            "provenance": provenance()}


def engines(folder: Path, models: dict[str, Path], flags: Sequence[str]) -> dict[str, Server]:
    """Describe vLLM servers that answer under their own names."""
    servers = {}
    for name, model in models.items():
        servers[name] = vllm_server(model, folder / f"{name}.log", name=name, served_name=name, flags=(*FLAGS, *flags))
        servers[name].environment["PYTHONPATH"] = str(ROOT)
    return servers


def start_gateway(
    folder: Path, arms: Sequence[str], *more: str, canary: bool = False
) -> tuple[str, "subprocess.Popen[str]"]:
    """Start `vocabext serve gateway`; returns its URL and its process."""
    command = [sys.executable, "-m", "vocabext", "serve", "gateway", *arms, "--port", "0", "--json",
               "--canary" if canary else "--no-canary", "--model-name", "stories", "--state",
               str(folder / "state.json"), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line.rstrip() == "}":
            break
    return str(json.loads(text)["url"]).removesuffix("/v1"), process


def process_connections(process_id: int) -> int:
    """Return how many sockets a process has open once nobody asks any more."""
    time.sleep(6)  # idle connections to the engines are closed after four seconds
    return sum("socket:" in str(path.readlink()) for path in Path(f"/proc/{process_id}/fd").iterdir()
               if path.is_symlink())


if __name__ == "__main__":
    sys.exit(main())
