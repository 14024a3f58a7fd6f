"""Count what a newcomer meets in a checkout: entries, lines, import chains and circles, public names.

    python benchmarks/house.py [CHECKOUT...]

Prints a table with a column for each checkout; give the folder of an older one to compare. Only source text is read.
"""

import ast
import sys
from functools import cache
from pathlib import Path

PACKAGES = ("vocabext", "serve")


def modules_of(root: Path) -> dict[str, Path]:
    """Return the modules of both packages by the name that they are imported by, and by the one of 0.2.0."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if not name.startswith("vocabext.serve")}


def graph_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Return which modules each one names in imports, also lazily or for types; root packages are left out."""
    graph = {}
    for module, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        named = {name.removeprefix("vocabext.") if name.startswith("vocabext.serve.") else name for name in named}
        graph[module] = {name for name in named & modules.keys() if "." in name and name != module}
    return graph


def longest_chain(graph: dict[str, set[str]]) -> int:
    """Return how many modules the longest way down through imports has; within a circle a module counts once."""
    sys.setrecursionlimit(10_000)
    under_way: set[str] = set()

    @cache
    def depth(module: str) -> int:
        under_way.add(module)
        below = [depth(other) for other in sorted(graph[module]) if other not in under_way]
        under_way.discard(module)
        return 1 + max(below, default=0)

    return max(map(depth, graph))


def in_circles(graph: dict[str, set[str]]) -> int:
    """Return how many modules reach themselves through imports."""

    def reach(start: str) -> set[str]:
        seen, todo = set[str](), [start]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    return sum(module in reach(module) for module in graph)


def public_names(root: Path) -> int:
    """Return how many names `import vocabext` offers."""
    tree = ast.parse((root / "vocabext" / "__init__.py").read_text(encoding="utf-8"))
    lists = [node.value for node in tree.body
             if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return len(lists[0].elts) if lists and isinstance(lists[0], ast.List) else 0


def facts(root: Path) -> dict[str, int]:
    """Count everything in one checkout."""
    modules = modules_of(root)
    graph = graph_of(modules)
    entries = [path for path in (root / "vocabext").iterdir()
               if not path.name.startswith("__") and not path.is_symlink()
               and (path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))))]
    return {
        "entries at the top of vocabext": len(entries), "of these single modules": sum(e.is_file() for e in entries),
        "product lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules.values()),
        "modules": len(modules), "longest import chain": longest_chain(graph),
        "modules in circles": in_circles(graph), "public names": public_names(root),
        "lines of README.md": len((root / "README.md").read_text(encoding="utf-8").splitlines()),
    }


def main() -> None:
    """Print the table."""
    roots = [Path(name) for name in sys.argv[1:]] or [Path(__file__).resolve().parents[1]]
    columns = [facts(root.resolve()) for root in roots]
    print("| | " + " | ".join(root.name or str(root) for root in roots) + " |")
    print("|---" * (len(roots) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:,}" for column in columns) + " |")


if __name__ == "__main__":
    main()
