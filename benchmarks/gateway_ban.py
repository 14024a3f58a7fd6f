"""Four ways to ban new tokens from base requests on one engine: what they cost, and what they let through.

    python benchmarks/gateway_ban.py [--json benchmarks/gateway_ban.json]

One vLLM engine serves an expanded stories model whose new rows are far too long, so that it wants to write them all
the time, as a broken expansion would. Each way answers the same prompts, in turn, three times. A leak is a new token in
an answer. `logit_bias 100` beside a ban is a client who asks for a new token.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from gateway_models import STORIES, make_pair
from gateway_soak import engines

from vocabext.checkpoint.manifest import Manifest, read_manifest
from vocabext.serve.engine import wait_until_ready
from vocabext.serve.gateway.keeper import ONE_ENGINE_FLAGS
from vocabext.serve.provenance import provenance
from vocabext.tokenizer import load_tokenizer

TOKENS, CONCURRENCY, ROUNDS = 64, 16, 3


def ways(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return the fields that each way adds to a request."""
    first, new = manifest.first_new_id, [token.token_id for token in manifest.tokens]
    return {"none": {}, "logits processor": {"vllm_xargs": {"vocabext_arm": "base"}},
            "allowed_token_ids": {"allowed_token_ids": list(range(first))},
            "logit_bias -100": {"logit_bias": {str(i): -100 for i in new}},
            "bad_words": {"bad_words": [token.token for token in manifest.tokens]}}


async def answer_all(url: str, prompts: list[list[int]], fields: dict[str, Any], first: int) -> tuple[float, int, int]:
    """Answer all prompts; returns seconds, bytes sent for one request, and new tokens written."""
    places, size, leaks = asyncio.Semaphore(CONCURRENCY), 0, 0
    async with aiohttp.ClientSession(trust_env=False) as session:

        async def one(number: int, prompt: list[int]) -> None:
            nonlocal size, leaks
            body = json.dumps({"model": "expanded", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True,
                               "temperature": 1.0, "seed": number, "return_token_ids": True, **fields}).encode()
            size = len(body)
            async with places, session.post(f"{url}/v1/completions", data=body,
                                            headers={"content-type": "application/json"}) as response:
                document = await response.json()
                assert response.status == 200, document
                leaks += sum(i >= first for i in document["choices"][0]["token_ids"])

        began = time.perf_counter()
        await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
        return time.perf_counter() - began, size, leaks


def main() -> int:
    """Measure; returns 3 if the ban that the gateway uses lets a new token through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="gateway-ban-") as name:
        base, expanded = make_pair(Path(name), scale=30.0)
        manifest, tokenizer = read_manifest(expanded), load_tokenizer(base).hf
        prompts = [tokenizer.encode(text) for text in STORIES] * 12
        server = engines(Path(name), {"expanded": expanded}, ONE_ENGINE_FLAGS)["expanded"]
        with server:
            wait_until_ready([server])
            seconds: dict[str, list[float]] = {}
            for round_number in range(ROUNDS + 1):  # the first round warms up
                for way, fields in ways(manifest).items():
                    took, size, leaks = asyncio.run(answer_all(server.url, prompts, fields, manifest.first_new_id))
                    seconds.setdefault(way, []).extend([took] if round_number else [])
                    row = rows.setdefault(way, {"request_bytes": size, "leaks": 0, "tokens": 0})
                    row["leaks"] += leaks
                    row["tokens"] += TOKENS * len(prompts)
            for way, took_all in seconds.items():
                rows[way]["seconds"] = round(statistics.median(took_all), 3)
            for way, fields in ways(manifest).items():
                first = str(manifest.first_new_id)
                asked = {**fields, "logit_bias": {**fields.get("logit_bias", {}), first: 100}}
                rows[way]["leaks_if_asked_for"] = asyncio.run(
                    answer_all(server.url, prompts[:10], asked, manifest.first_new_id))[2]
    print(f"{'way':18} {'seconds':>8} {'bytes/request':>14} {'leaks':>8} {'of tokens':>10} {'if asked for':>13}")
    for way, row in rows.items():
        print(f"{way:18} {row['seconds']:8.2f} {row['request_bytes']:14,} {row['leaks']:8,} {row['tokens']:10,} "
              f"{row['leaks_if_asked_for']:13,}")
    if options.json:
        document = {"artifact": "gateway-ban", "version": 1, "concurrency": CONCURRENCY, "ways": rows,
                    "provenance": provenance()}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    used = rows["logits processor"]
    return 3 if used["leaks"] or used["leaks_if_asked_for"] else 0


if __name__ == "__main__":
    sys.exit(main())
