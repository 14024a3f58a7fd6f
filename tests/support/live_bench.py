"""A whole comparison of two planted servers, under the real client of vLLM."""

import sys
from pathlib import Path
from typing import Any

from vocabext.serve.bench.client import LoadClient
from vocabext.serve.bench.journal import Journal
from vocabext.serve.bench.pool import BASE, EXPANDED
from vocabext.serve.bench.scenarios import DECODE, PREFILL
from vocabext.serve.bench.stage import BenchConfig, Setting, compare_servers
from vocabext.serve.engine import Server, free_port

FAKE = Path(__file__).with_name("fake_server.py")
PROMPTS = {PREFILL: tuple(f"a long prompt, number {i}" for i in range(4)),
           DECODE: tuple(f"short {i}" for i in range(4))}


class Characters:
    """A tokenizer with one token per character, as the planted servers have."""

    num_ids = 256

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def run_comparison(
    client: LoadClient, folder: Path, *, pairs: int = 5, config: dict[str, Any] | None = None, base: str = "",
    expanded: str = "",
) -> dict[str, Any]:
    """Compare two planted servers, described as fake_server.py takes it."""
    options = BenchConfig(pairs=pairs, texts=4, output_characters=8,
                          **{"scenario": (PREFILL,), **(config or {})})  # type: ignore[arg-type]
    setting = Setting(options, {}, {BASE: Characters(), EXPANDED: Characters()},  # type: ignore[dict-item]
                      {name: PROMPTS[name] for name in options.scenario}, None, "cpu", most_answer_tokens=4)
    planted = {BASE: base.split(), EXPANDED: expanded.split()}

    def make(role: str, *, alone: bool) -> Server:
        port = free_port()
        return Server([sys.executable, str(FAKE), str(port), "healthy", "0", *planted[role]],
                      f"http://127.0.0.1:{port}", folder / f"{role}.log", name=f"the {role} server")

    journal = Journal.open(folder / "bench.json", {"options": {"pairs": pairs}})
    return compare_servers(setting, make, client, journal, {"base": "b", "expanded": "e"}, log_folder=folder)
