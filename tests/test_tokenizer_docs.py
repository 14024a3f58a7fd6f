"""docs/tokenizers.md names every refusal of vocabext/tokenizer, and none that is gone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from vocabext.tokenizer import scheme

ROOT = Path(__file__).resolve().parents[1]
LONGER = "; supported are …"


def messages() -> Iterator[str]:
    """Yield the messages of all TokenizerErrors, with `…` for what differs."""
    for path in sorted((ROOT / "vocabext" / "tokenizer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TokenizerError":
                message = shown(node.args[0]).removesuffix(LONGER)
                yield from (f"… {rule}" for rule in broken_rules()) if message == "… …" else [message]


def broken_rules() -> Iterator[str]:
    """Yield what a token is said to do that hides a stop or a ban."""
    tree = ast.parse((ROOT / "vocabext" / "checkpoint" / "named_ids.py").read_text(encoding="utf-8"))
    (function,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "broken_by")
    yield from (shown(node.value) for node in ast.walk(function)
                if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr))


def shown(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(shown, node.values))
    if isinstance(node, ast.FormattedValue):
        return shown(node.value) if ast.unparse(node.value) == "EXTENDED_BEFORE" else "…"
    assert isinstance(node, ast.Name), f"{ast.unparse(node)} is no message that this test can read"
    return str(getattr(scheme, node.id))


def test_every_refusal_is_in_the_docs_and_nothing_else() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "tokenizers.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == set(messages())


def test_every_refusal_says_why_or_is_plain() -> None:
    text = (ROOT / "docs" / "tokenizers.md").read_text(encoding="utf-8").split("### Texts")[0]
    for row in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
        _, message, why, out, _ = (cell.strip() for cell in row.split(" | ".strip()))
        assert all((why, out)), message
