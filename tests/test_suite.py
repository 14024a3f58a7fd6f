"""The tests themselves: what they share lies in tests/support, and what takes long is kept for `make fuzz`."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCES = sorted(TESTS.rglob("*.py"))


def modules_imported(path: Path) -> set[str]:
    """Return the first parts of the names of all modules that a file imports, in scripts within strings as well."""
    texts = [path.read_text(encoding="utf-8")]
    for node in ast.walk(ast.parse(texts[0])):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            texts += [line.strip() for line in node.value.splitlines() if line.strip().startswith(("import ", "from "))]
    found = set()
    for text in texts:
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except SyntaxError:
            continue  # prose
        for node in nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found


def test_no_test_module_is_imported() -> None:
    modules = {path.stem for path in TESTS.glob("test_*.py")} | {"conftest", "tests"}
    assert len(modules) > 50
    assert not {(path.name, name) for path in SOURCES for name in modules_imported(path) & modules}


def test_one_file_starts_vllm_in_make_test_and_all_others_in_make_fuzz() -> None:
    in_make_test = set()
    for path in TESTS.glob("test_*.py"):
        lines = path.read_text(encoding="utf-8").splitlines() if path != Path(__file__) else []
        places = [i for i, line in enumerate(lines) if "pytest.mark.vllm" in line]
        if any("pytest.mark.fuzz" not in "".join(lines[i - 1 : i + 2]) for i in places):
            in_make_test.add(path.name)
    assert in_make_test == {"test_end_to_end.py"}


@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_every_pinned_package_has_hashes(build: str) -> None:
    lines = (TESTS.parent / "constraints" / f"{build}.txt").read_text().splitlines()
    pins = [i for i, line in enumerate(lines) if line and line[0] not in "# "]
    assert len(pins) > 100
    assert [lines[i] for i in pins if not lines[i + 1].startswith("    --hash=sha256:")] == []
