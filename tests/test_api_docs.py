"""What the documentation says in Python runs: blocks of pages, examples in docstrings, the notebook."""

from __future__ import annotations

import inspect
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import tiny_folder
from tiny_expanded import DOCUMENTS

import vocabext

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
MODELS = ("meta-llama/Llama-3.1-8B", "examples/model")
FENCE = re.compile(r"( *)```python\n(.*?)\n\1```", re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and text under the names that the documentation uses."""
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 300)
    monkeypatch.chdir(tmp_path)
    for model in MODELS:
        Path(model).parent.mkdir()
        tiny_folder(Path(model))
    # The same words in another order each time: text that says nothing again.
    rng = random.Random(0)
    words = [document.text.split() for document in DOCUMENTS]
    lines = [json.dumps({"text": " ".join(rng.sample(some, len(some)))}) + "\n" for _ in range(6) for some in words]
    Path("notes").mkdir()
    for name in ("notes/a.jsonl", "notes/b.jsonl", "notes.jsonl", "heldout.jsonl"):
        Path(name).write_text("".join(lines[3:] if name == "heldout.jsonl" else lines))
    return tmp_path


def run(block: str, names: dict[str, Any] | None = None) -> None:
    """Run a block with fewer tokens, on one core's model."""
    if "to_pandas" in block:
        pytest.importorskip("pandas")
    exec(compile(re.sub(r"budget=\d\d+", "budget=3", block), "documentation", "exec"), {} if names is None else names)


def blocks() -> Iterator[Any]:
    """Yield the blocks that pages mark, with what is run before them."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text, before = page.read_text(encoding="utf-8"), ""
        for after, block in re.findall(r"<!-- api( after expand)? -->\n```python\n(.*?)\n```", text, re.DOTALL):
            yield pytest.param(before if after else "", block, id=f"{page.name}: {block.splitlines()[-1][:40]}")
            before = block


@pytest.mark.slow
@pytest.mark.parametrize(("before", "block"), list(blocks()))
def test_every_block_about_the_api_runs(place: Path, before: str, block: str) -> None:
    for part in (before, block):
        run(part)
    assert any((place / name).is_dir() for name in ("llama-medical", "llama-again"))


def test_the_blocks_were_found() -> None:
    assert len(list(blocks())) >= 4


def examples(name: str) -> list[str]:
    return [inspect.cleandoc(block) for _, block in FENCE.findall(inspect.getdoc(getattr(vocabext, name)) or "")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Model", "Expanded", "TokenTable", "Snippets", "NewRows", "Evaluation", "expand"])
def test_the_example_in_a_docstring_runs(place: Path, name: str) -> None:
    (example,) = examples(name)
    names: dict[str, Any] = {"vocabext": vocabext}
    if name not in ("Model", "TokenTable", "expand"):
        names["base"] = base = vocabext.load("examples/model")
        names["tokens"] = tokens = base.mine("notes.jsonl", budget=3)
        names["snippets"] = snippets = base.collect(tokens, "notes.jsonl")
        if name != "NewRows":
            names["new"] = base.patch(base.distill(snippets, method="mean"), "expanded")
    run(example, names)


CELLS = """
import ast, sys
for number, cell in enumerate(CELLS):
    tree = ast.parse(cell)
    shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"))
    if shown is not None:
        value = eval(compile(ast.Expression(shown.value), f"cell {number}", "eval"))
        print(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
"""


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    for path in (ROOT / "examples").iterdir():
        (tmp_path / path.name).symlink_to(path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    done = subprocess.run([sys.executable, "-c", f"CELLS = {cells!r}\n{CELLS}"], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<table>") == 6
    assert "<p>notebook-out/distilled passed</p>" in done.stdout
    assert (tmp_path / "notebook-out" / "distilled" / "eval.json").is_file()


def test_the_notebook_stores_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], len({cell["id"] for cell in notebook["cells"]})) == (4, len(notebook["cells"]))
    for cell in notebook["cells"]:
        assert cell["source"]
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
