"""Does the canary take back a bad expanded model on its own, and leave a good one alone? With real engines.

    python benchmarks/gateway_canary.py BASE EXPANDED --corpus heldout.jsonl [--json benchmarks/gateway_canary.json]

Three trials behind the same gateway, all requests answered by the base and mirrored to the other arm:
`base` (an identical arm), `expanded` (the model as it is), and `shuffled` (each new token has the input row of another
one: the planted bad model). Prompts are beginnings of held-out documents. Both engines share the machine, so times are
not judged here, and the next requests wait for the mirrored ones. Exit code 3 if the shuffled model stays, or another
one is taken back.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
from gateway_soak import engines, start_gateway
from safetensors.torch import load_file, save_file

from vocabext.checkpoint.folder import open_checkpoint
from vocabext.checkpoint.manifest import read_manifest
from vocabext.corpus import read_documents
from vocabext.serve.engine import wait_until_ready
from vocabext.serve.provenance import provenance

PROMPT_CHARACTERS, ANSWER_TOKENS, SHIFT = 300, 32, 7
TIMES_FREE = ("--max-pace", "1000", "--max-first", "1000")
MIRROR_SECONDS = 60.0


def main() -> int:
    """Run the three trials; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("expanded", type=Path)
    parser.add_argument("--corpus", action="append", required=True)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--max-reading-loss", type=float, default=0.03)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts = [document.text[:PROMPT_CHARACTERS].rsplit(" ", 1)[0] for document in read_documents(options.corpus)]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    trials = {}
    with tempfile.TemporaryDirectory(prefix="gateway-canary-") as name:
        folder = Path(name)
        arms = {"base": options.base, "expanded": options.expanded,
                "shuffled": shuffled(options.expanded, folder / "shuffled")}
        for arm, model in arms.items():
            trials[arm] = trial(folder, options, model, prompts)
            print(json.dumps({arm: trials[arm]}, indent=2), flush=True)
    result = {"artifact": "gateway-canary", "version": 1, "base": options.base.name, "expanded": options.expanded.name,
              "corpus": [Path(corpus).name for corpus in options.corpus], "requests": options.requests,
              "max_reading_loss": options.max_reading_loss, "trials": trials, "provenance": provenance()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    wrong = [arm for arm, found in trials.items() if (found["taken_back_after"] is not None) != (arm == "shuffled")]
    print(f"taken back or left alone as it should be: {sorted(set(trials) - set(wrong))}; wrongly: {wrong}")
    return 3 if wrong else 0


def shuffled(expanded: Path, output: Path) -> Path:
    """Copy an expanded model, and give each new token the input row of another one."""
    shutil.copytree(expanded, output)
    checkpoint, manifest = open_checkpoint(output), read_manifest(output)
    name, first = checkpoint.vocab_tensors[0], manifest.first_new_id
    path = output / checkpoint.tensors[name].file
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    end = first + len(manifest.tokens)
    tensors[name][first:end] = tensors[name][first:end].roll(SHIFT, 0)
    save_file(tensors, path, {"format": "pt"})
    return output


def trial(folder: Path, options: argparse.Namespace, model: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """Mirror requests to a model until the canary takes it back, or all were sent."""
    with ExitStack() as stack:
        servers = engines(folder, {"base": options.base, "expanded": model}, ())
        for server in servers.values():
            stack.enter_context(server)
        wait_until_ready(list(servers.values()))
        url, process = start_gateway(folder, [servers["base"].url, servers["expanded"].url], "--max-reading-loss",
                                     str(options.max_reading_loss), *TIMES_FREE, canary=True)
        try:
            return asyncio.run(send(url, folder / "state.json", prompts, options))
        finally:
            process.terminate()
            process.wait(timeout=60)
            (folder / "state.json").unlink()


async def send(url: str, state: Path, prompts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Ask until something has changed; returns when it did, why, and what was known then."""
    document, sent = json.loads(state.read_text()), 0
    admin, token = document["admin_url"], {"x-vocabext-token": document["token"]}
    async with aiohttp.ClientSession(trust_env=False) as session:
        async with session.post(f"{admin}/swap", json={"mirror_percent": 100}, headers=token) as answer:
            assert answer.status == 200, await answer.text()

        async def status() -> dict[str, Any]:
            async with session.get(f"{admin}/status", headers=token) as answer:
                return dict(await answer.json())

        async def ask(number: int) -> None:
            body = {"model": "stories", "prompt": prompts[number % len(prompts)], "max_tokens": ANSWER_TOKENS,
                    "temperature": 0}
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()

        found = await status()
        while sent < options.requests and found["changes"][-1]["by"] != "canary":
            before = found
            await asyncio.gather(*(ask(sent + i) for i in range(options.clients)))
            sent += options.clients
            found = await settled(status, sent)
        back = found["changes"][-1]["by"] == "canary"
        known = (before if back else found)["canary"]["findings"]  # a trial begins anew once it is over
        return {"requests": sent, "taken_back_after": sent if back else None, "reason": found["changes"][-1]["reason"],
                "findings": known}


async def settled(status: Callable[[], Awaitable[dict[str, Any]]], sent: int) -> dict[str, Any]:
    """Wait until the answers to all requests were compared, and return the status."""
    until = time.monotonic() + MIRROR_SECONDS
    found = await status()
    while (time.monotonic() < until and found["changes"][-1]["by"] != "canary"
           and found["canary"]["findings"][-1]["values"]["expanded"] < sent):
        await asyncio.sleep(0.1)
        found = await status()
    return found


if __name__ == "__main__":
    sys.exit(main())
