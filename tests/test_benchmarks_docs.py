"""docs/benchmarks.md says what the committed JSON says: each section is made anew and compared."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
SECTIONS = {"Gateway": "gateway_docs", "Serving": "serve_docs", "Tokenizers": "tokenizer_docs",
            "Distillation": "distill_tables", "Checkpoints": "patch_tables", "Writing": "writing"}


@pytest.fixture(autouse=True)
def benchmarks_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def made_anew(title: str) -> str:
    module: Any = importlib.import_module(SECTIONS[title])
    folder = ROOT / "benchmarks"
    if title == "Checkpoints":
        return str(module.section([json.loads(path.read_text("utf-8")) for path in folder.glob("patch_speed*.json")]))
    if title == "Writing":
        return str(module.as_markdown(json.loads((folder / "writing.json").read_text("utf-8"))))
    return str(module.section(folder) if title in ("Gateway", "Distillation") else module.section())


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_is_what_its_script_makes_of_the_json(title: str) -> None:
    from sections import section_of

    text = DOCUMENT.read_text(encoding="utf-8")
    assert section_of(text, title).strip() == made_anew(title).strip()


def test_every_section_has_a_script() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert {line[3:] for line in text.splitlines() if line.startswith("## ")} == {*SECTIONS, "What is measured on"}


def test_another_number_in_the_json_is_seen(tmp_path: Path) -> None:
    from gateway_docs import section
    from sections import section_of

    for path in (ROOT / "benchmarks").glob("gateway_*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    soak = json.loads((tmp_path / "gateway_soak.json").read_text("utf-8"))
    (tmp_path / "gateway_soak.json").write_text(json.dumps({**soak, "swaps": soak["swaps"] + 1}), "utf-8")
    assert section(tmp_path).strip() != section_of(DOCUMENT.read_text("utf-8"), "Gateway").strip()
