"""What the gateway adds: the same requests direct and through it, in turn.

    python benchmarks/gateway_overhead.py [--model biomed-13m] [--json benchmarks/gateway_overhead.json]

Two upstreams: a fake one that takes 20 ms (the gateway's own cost, without an engine that competes for the
cores), and vLLM. Two
loads: one request at a time, not streamed (what is added to the median), and 32 streams at once (what is left of the
throughput). Everything shares this machine's cores, as the gateway's budget has to be met there.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
from gateway_models import ASSETS, STORIES
from gateway_soak import start_gateway

from vocabext.serve.engine import Server, free_port, vllm_server, wait_until_ready
from vocabext.serve.provenance import provenance

FAKE = Path(__file__).resolve().parents[1] / "tests" / "support" / "fake_vllm.py"
CONCURRENCY, TOKENS = 32, 32


async def load(url: str, model: str, *, requests: int, concurrency: int, stream: bool) -> tuple[float, float]:
    """Send requests; returns the median seconds of one, and requests per second."""
    places, took = asyncio.Semaphore(concurrency), []
    async with aiohttp.ClientSession(trust_env=False, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(number: int) -> None:
            body = {"model": model, "prompt": STORIES[number % len(STORIES)], "max_tokens": TOKENS if stream else 1,
                    "ignore_eos": True, "stream": stream, "temperature": 0}
            async with places:
                began = time.perf_counter()
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    await response.read()
                    assert response.status == 200
                took.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(requests)))
        return statistics.median(took), requests / (time.perf_counter() - began)


def compare(direct: str, through: str, model: str, rounds: int, requests: int) -> dict[str, Any]:
    """Measure direct and through the gateway in turn; the first round warms up."""
    rows: dict[str, list[float]] = {"direct": [], "gateway": [], "direct_rate": [], "gateway_rate": []}
    for number in range(rounds + 1):
        for name, url in (("direct", direct), ("gateway", through))[:: 1 if number % 2 else -1]:
            median, _ = asyncio.run(load(url, model, requests=requests, concurrency=1, stream=False))
            _, rate = asyncio.run(load(url, model, requests=requests, concurrency=CONCURRENCY, stream=True))
            if number:
                rows[name].append(median)
                rows[f"{name}_rate"].append(rate)
    added = [1000 * (g - d) for g, d in zip(rows["gateway"], rows["direct"], strict=True)]
    kept = [g / d for g, d in zip(rows["gateway_rate"], rows["direct_rate"], strict=True)]
    return {"added_ms": round(statistics.median(added), 3), "added_ms_rounds": [round(v, 3) for v in added],
            "throughput_kept": round(statistics.median(kept), 4), "throughput_kept_rounds": [round(v, 4) for v in kept],
            "direct_ms": round(1000 * statistics.median(rows["direct"]), 3),
            "direct_requests_per_second": round(statistics.median(rows["direct_rate"]), 2)}


def main() -> None:
    """Measure both upstreams, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="biomed-13m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gateway-overhead-") as name:
        for kind in ("fake", "vllm"):
            folder = Path(name) / kind
            folder.mkdir()
            with ExitStack() as stack:
                if kind == "fake":
                    port = free_port()
                    server = Server([sys.executable, str(FAKE), str(port), "base", "--delay", "0.02", "--model", "m"],
                                    f"http://127.0.0.1:{port}", folder / "log")
                else:
                    server = vllm_server(ASSETS / "models" / options.model, folder / "log", served_name="m",
                                         flags=("--dtype", "float32", "--max-num-seqs", "64", "--max-model-len", "512"))
                stack.enter_context(server)
                wait_until_ready([server])
                url, process = start_gateway(folder, [server.url, server.url])
                stack.callback(_stop, process)
                results[kind] = compare(server.url, url, "m", options.rounds, 128 if kind == "fake" else 64)
    print(f"{'upstream':9} {'direct, ms':>11} {'added, ms':>10} {'direct, requests/s':>19} {'throughput kept':>16}")
    for kind, row in results.items():
        print(f"{kind:9} {row['direct_ms']:11.2f} {row['added_ms']:10.2f} {row['direct_requests_per_second']:19.1f} "
              f"{row['throughput_kept']:16.1%}")
    if options.json:
        document = {"artifact": "gateway-overhead", "version": 1, "model": options.model, "concurrency": CONCURRENCY,
                    "upstreams": results, "provenance": provenance()}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def _stop(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    process.wait(timeout=60)


if __name__ == "__main__":
    main()
