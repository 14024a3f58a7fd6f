"""docs/benchmarks.md and docs/families.md say what the committed JSON says: each part is made anew and compared."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted import draw_fewer_texts

from vocabext.errors import UsageError
from vocabext.model.logit_map import LogitMap

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
SECTIONS = {"Gateway": "gateway_docs", "Serving": "serve_docs", "Tokenizers": "tokenizer_docs",
            "Distillation": "distill_tables", "Checkpoints": "patch_tables", "Writing": "writing",
            "Mining": "mine_dedup", "Choosing by cost": "choose", "Healing": "heal"}


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
    if title == "Choosing by cost":
        return str(module.section(json.loads((folder / "choose.json").read_text("utf-8"))))
    if title == "Healing":
        result = json.loads((folder / "heal.json").read_text("utf-8"))
        return str(module.as_markdown(result, folder / "heal_ablations.json"))
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


# -- docs/families.md ---------------------------------------------------------------------------------------------

def families() -> tuple[Any, dict[str, Any]]:
    module: Any = importlib.import_module("families")
    return module, json.loads(module.FOUND.read_text("utf-8"))


def test_the_page_of_families_is_what_its_script_makes_of_the_json() -> None:
    module, found = families()
    assert module.PAGE.read_text("utf-8") == module.page(found)


def test_every_family_of_the_tests_is_on_the_page_and_nothing_is_at_fault() -> None:
    module, found = families()
    assert list(found["families"]) == [*module.FAMILIES, *module.READERS, *module.UNREADABLE]
    assert list(found["kinds"]) == [*module.OTHER_KINDS, "an adapter"]
    assert all(list(cells) == ["what it takes", *module.COLUMNS] for cells in found["families"].values())
    assert module.faults(found) == []
    assert all(cell.startswith(module.REFUSED) for cell in found["kinds"].values())


def test_a_family_is_at_fault_where_a_number_is_wrong_or_something_breaks_off(tmp_path: Path) -> None:
    module, found = families()
    cells: dict[str, Callable[[], str]] = {
        "wrong": lambda: module.rounding(0.03), "broken": lambda: str([][0]), "lines": lambda: refuse("two\nlines"),
        "refused": lambda: refuse(f"{tmp_path}/MODEL has no head"), "right": lambda: module.rounding(2e-8)}
    found["families"] = {"llama": {name: module.attempt(cell, tmp_path) for name, cell in cells.items()}}
    assert module.faults(found) == ["llama: FAULT: 3e-2", "llama: FAULT: IndexError: list index out of range",
                                    "llama: FAULT: several lines: 'two\\nlines'"]
    assert found["families"]["llama"]["refused"] == "refused: MODEL has no head"
    assert found["families"]["llama"]["right"] == "2e-8"


def refuse(line: str) -> str:
    raise UsageError(line)


def test_a_scale_that_is_forgotten_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_fewer_texts(monkeypatch)
    module, _ = families()
    family = module.Family("granite", tmp_path)
    family.run("mean")
    assert float(family.logits()) < module.ROUNDING
    monkeypatch.setitem(family.model.__dict__, "logit_map", LogitMap())
    assert family.logits() == "FAULT: 7e+00"
