"""The house rules, read off the source: what imports what, and what stays inside its file."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. An entry imports entries of lower floors and nothing else, so a stage never imports another stage.
VOCABEXT = (
    {"errors"},
    {"files", "options", "progress", "tables", "tokens"},
    {"checkpoint", "corpus"},
    {"model", "tokenizer"},
    {"choose", "collect", "diff", "distill", "evaluate", "heal", "inspect", "mine", "patch", "revert", "verify"},
    {"run"},
    {"api"},
    {"cli"},
    {"__main__"},
)
SERVE = (
    {"engine", "model", "provenance"},
    {"bench", "gateway", "lengths", "predict"},
    {"report"},
)
LOWER = 4  # floors of vocabext on which `serve` stands


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ("vocabext",) if parts[0] == "serve" else ()  # vocabext/serve is a link to it
    return ".".join((*package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {name_of(path): path for package in ("vocabext", "serve") for path in sorted((ROOT / package).rglob("*.py"))}
SERVE_NAME = "vocabext.serve."


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(module: str) -> set[str]:
    """The modules of ours that a module names anywhere, lazily or for types only; the root packages do not count."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return {name for name in found & MODULES.keys() if "." in name}


def floor(module: str) -> int:
    """On which floor the top-level entry of a module is; `serve` stands beside the stages."""
    entry = entry_of(module).rpartition(".")[2]
    floors, ground = (SERVE, LOWER) if module.startswith(SERVE_NAME) else (VOCABEXT, 0)
    return next((ground + i for i, entries in enumerate(floors) if entry in entries), -1)


def entry_of(module: str) -> str:
    return ".".join(module.split(".")[: 3 if module.startswith(SERVE_NAME) else 2])


@pytest.mark.parametrize(("package", "floors"), [("vocabext", VOCABEXT), ("serve", SERVE)])
def test_top_level_entries_are_verbs_and_a_few_nouns(package: str, floors: tuple[set[str], ...]) -> None:
    entries = {path.stem for path in (ROOT / package).iterdir() if not path.is_symlink()
               and (path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))))}
    assert entries - {"__init__"} == set().union(*floors)


def test_imports_point_downwards_and_no_stage_imports_another() -> None:
    upwards = [f"{module} imports {other}" for module in MODULES if "." in module for other in sorted(imported(module))
               if entry_of(module) != entry_of(other) and floor(other) >= floor(module)
               and not (entry_of(module) == "vocabext.cli" and other.startswith(SERVE_NAME))]
    assert upwards == []


def test_serve_stands_on_the_lower_floors_of_vocabext() -> None:
    above = [f"{module} imports {other}" for module in MODULES if module.startswith(SERVE_NAME)
             for other in sorted(imported(module)) if not other.startswith(SERVE_NAME) and floor(other) >= LOWER]
    assert above == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every module that imports itself by way of others, with the way."""
    found = []
    for start in graph:
        ways = [[start]]
        seen = set[str]()
        while ways:
            way = ways.pop()
            for other in graph[way[-1]]:
                if other == start:
                    found.append([*way, start])
                elif other not in seen:
                    seen.add(other)
                    ways.append([*way, other])
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: imported(module) - {module} for module in MODULES}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})  # it does find one
    assert circles(graph) == []


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_private_name_is_imported_from_another_module() -> None:
    taken = [f"{module}: {node.module}.{alias.name}" for module in MODULES for node in ast.walk(tree_of(module))
             if isinstance(node, ast.ImportFrom) and node.module in MODULES
             for alias in node.names if private(alias.name)]
    assert taken == []


def defined(tree: ast.Module) -> Iterator[str]:
    """Names of functions and classes, and of attributes that are assigned to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_no_private_attribute_of_another_module_is_used() -> None:
    owner: dict[str, set[str]] = {}
    for module in MODULES:
        for name in filter(private, defined(tree_of(module))):
            owner.setdefault(name, set()).add(module)
    used = [f"{module}:{node.lineno}: {ast.unparse(node)}" for module in MODULES for node in ast.walk(tree_of(module))
            if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) not in ("self", "cls")
            and module not in owner.get(node.attr, {module})]
    assert used == []


def narrows(test: ast.expr) -> bool:
    """Whether a condition only tells the type checker what a value is."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return narrows(test.operand)
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.IsNot):
        return not any(isinstance(node, ast.Call) for node in ast.walk(test))
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


def test_no_check_vanishes_under_python_o() -> None:
    checks = [f"{module}:{node.lineno}: {ast.unparse(node)}" for module in MODULES if not module.startswith(SERVE_NAME)
              for node in ast.walk(tree_of(module)) if isinstance(node, ast.Assert) and not narrows(node.test)]
    assert checks == []


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for module in MODULES:
        for node in tree_of(module).body:
            if isinstance(node, ast.ClassDef) and not (private(node.name) and module.startswith(SERVE_NAME)):
                places.setdefault(node.name, []).append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_one_name_for_how_many_ids_the_base_has_and_one_for_the_first_new_id() -> None:
    """`num_own_ids` and `first_new_id`; the keys of files keep the name that they had."""
    keys = {"vocabext.checkpoint.manifest", "vocabext.inspect"}
    named = {f"{module}:{node.lineno}: {node.arg}" for module in MODULES.keys() - keys
             for node in ast.walk(tree_of(module))
             if isinstance(node, ast.arg) and node.arg in ("num_base", "num_used", "num_used_ids")}
    assert named == set()
