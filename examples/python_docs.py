"""Extract a domain corpus that every Python installation carries.

A demonstration of domain vocabulary needs domain text.  This script takes it from CPython
itself, so nothing has to be downloaded and nothing has to be stored in the repository:

* the language reference topics that ``help("topic")`` shows (``pydoc_data.topics``), and
* the docstrings of the standard library's modules, classes and functions.

Nothing of the standard library is imported on the way: every source file is *parsed* with
:mod:`ast`, and the docstrings are read from the tree.

The documents are split into a **mining** side (about 90 %) and a **held-out** side (about 10 %).
The side is decided by a hash of the topic's or the top-level module's name, and by nothing else:

* all documents of one module are on one side, so a held-out document is about a module that the
  mining side never describes, and
* a module is on the same side under every Python version.

A docstring that occurs word for word twice (a backport, a subclass) is kept once, on the mining
side where there is a choice, so that the held-out side has no text that was mined.

Usage::

    python examples/python_docs.py -o corpus/

writes ``corpus/mining.jsonl`` and ``corpus/heldout.jsonl``, one ``{"id": ..., "text": ...}``
object per line.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_CHARS = 1_200
"""Documents are cut at the last section or paragraph that ends before this many characters."""

MIN_CHARS = 80
"""Shorter documents say nothing and are dropped."""

HELDOUT_PERCENT = 10

SKIPPED_PARTS = frozenset(
    {
        "__pycache__",
        "config",
        "distutils",  # gone since Python 3.12
        "dist-packages",
        "ensurepip",
        "idlelib",
        "idle_test",
        "lib-dynload",
        "lib2to3",  # gone since Python 3.13
        "pydoc_data",  # read as topics
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
"""Folders of the standard library that are not documentation of it."""

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class ExtractError(Exception):
    """A problem the user can act on; the message is one line."""


@dataclass(frozen=True)
class Document:
    """One document of the corpus.

    Attributes:
        id: Unique name, ``topic:NAME#PART`` or ``module:NAME#PART``.
        group: The topic or top-level module that decides the side.
        text: The document's text.
    """

    id: str
    group: str
    text: str


def is_heldout(group: str) -> bool:
    """Say whether the documents of a topic or module are held out.

    Args:
        group: A group name as in :attr:`Document.group`.

    Returns:
        True for about ``HELDOUT_PERCENT`` of all names; the same on every machine and version.
    """
    digest = hashlib.sha256(f"vocabext:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT


def group_of_module(module: str) -> str:
    """Name the group of a module: its public top-level name.

    ``asyncio.events`` belongs to ``asyncio``, and ``_pydatetime`` to ``datetime`` (pure-Python
    twins hold the same docstrings, and move between the two files from version to version).

    Args:
        module: A dotted module name.

    Returns:
        The group, ``module:NAME``.
    """
    top = module.split(".")[0]
    top = top.removeprefix("_py") if top.startswith("_py") else top.lstrip("_")
    return f"module:{top or module}"


# --- Reading --------------------------------------------------------------------------------


def parse_source(path: Path) -> ast.Module | None:
    """Parse one source file.

    Args:
        path: A Python file.

    Returns:
        The tree, or None for a file that is not valid UTF-8 Python (a template, for instance).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old modules are not our concern
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def read_topics(stdlib: Path) -> dict[str, str]:
    """Read the help topics without importing them.

    Args:
        stdlib: The standard library's folder.

    Returns:
        Topic name to text.

    Raises:
        ExtractError: When the installation lacks the topics.
    """
    path = stdlib / "pydoc_data" / "topics.py"
    tree = parse_source(path) if path.is_file() else None
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return {str(name): str(text) for name, text in sorted(topics.items())}
    raise ExtractError(f"no help topics in {path}")


def find_modules(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """Walk the standard library's modules in sorted order.

    Args:
        stdlib: The standard library's folder.

    Yields:
        Dotted module name and file.
    """
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if any(skipped_part(part) for part in parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path


def skipped_part(part: str) -> bool:
    """Say whether a folder or file name marks something that is not part of the corpus."""
    return part in SKIPPED_PARTS or part.startswith(("_sysconfigdata", "config-", "test_")) or not part.isidentifier()


def heading(node: ast.ClassDef | FunctionNode, qualname: str) -> str:
    """Write the line that introduces a class or function, as its definition reads.

    Args:
        node: The definition.
        qualname: Its dotted name.

    Returns:
        For instance ``textwrap.indent(text, prefix, predicate=None)``.
    """
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {qualname}({bases})" if bases else f"class {qualname}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{prefix}{qualname}({ast.unparse(node.args)}){returns}"


def clean(text: str) -> str:
    """Normalise a docstring or topic: no common indent, no trailing blanks, no outer blank lines.

    The indent that all lines but the first share goes too, so that a one-line summary and an
    indented remainder start in the same column.

    Args:
        text: Raw text.

    Returns:
        The cleaned text.
    """
    lines = [line.rstrip() for line in inspect.cleandoc(text).splitlines()]
    return "\n".join(lines).strip("\n")


class SectionReader:
    """Collects the documented definitions of one module, in source order.

    A *section* is a heading and a docstring.  Docstrings that any reader has seen before are
    left out, which is why the readers of all modules share one ``seen`` set.
    """

    def __init__(self, seen: set[str]) -> None:
        """Start with the docstrings seen so far.

        Args:
            seen: Docstrings of earlier modules; new ones are added.
        """
        self.seen = seen

    def read(self, module: str, tree: ast.Module) -> Iterator[str]:
        """Yield the sections of one module.

        Args:
            module: Dotted name of the module.
            tree: Its source.

        Yields:
            Heading, blank line and docstring of the module, then of every documented definition.
        """
        yield from self.section(f"Module {module}", tree)
        yield from self.children(module, tree)

    def children(self, qualname: str, parent: ast.Module | ast.ClassDef) -> Iterator[str]:
        """Yield the sections of the definitions directly inside a module or class."""
        for node in definitions(parent.body):
            name = f"{qualname}.{node.name}"
            yield from self.section(heading(node, name), node)
            if isinstance(node, ast.ClassDef):
                yield from self.children(name, node)

    def section(self, title: str, node: ast.Module | ast.ClassDef | FunctionNode) -> Iterator[str]:
        """Yield one section, or nothing where there is no new docstring."""
        text = clean(ast.get_docstring(node, clean=True) or "")
        if text and text not in self.seen:
            self.seen.add(text)
            yield f"{title}\n\n{text}"


def definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | FunctionNode]:
    """Yield definitions in a body, also those under a module-level ``if`` or ``try``."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from definitions(node.body)
            yield from definitions(node.orelse)
            for handler in getattr(node, "handlers", []):
                yield from definitions(handler.body)


# --- Documents ------------------------------------------------------------------------------


def pack(sections: list[str], limit: int = MAX_CHARS) -> list[str]:
    """Join consecutive sections into documents of at most ``limit`` characters.

    A section that is longer than the limit is cut between paragraphs; a single paragraph that is
    longer still stays whole.

    Args:
        sections: Texts in reading order.
        limit: Longest document wanted, in characters.

    Returns:
        The documents' texts.
    """
    documents: list[str] = []
    current = ""
    for section in sections:
        pieces = section.split("\n\n") if len(section) > limit else [section]
        for piece in pieces:
            if current and len(current) + len(piece) + 2 > limit:
                documents.append(current)
                current = ""
            current = f"{current}\n\n{piece}" if current else piece
    if current:
        documents.append(current)
    return documents


def documents_of(group: str, name: str, sections: list[str]) -> Iterator[Document]:
    """Yield the documents of one topic or module."""
    for number, text in enumerate(pack(sections)):
        text = text.strip("\n")
        if len(text) >= MIN_CHARS:
            yield Document(f"{name}#{number}", group, text)


def extract(stdlib: Path | None = None) -> tuple[list[Document], list[Document]]:
    """Extract the corpus.

    Args:
        stdlib: The standard library's folder; this interpreter's own where left out.

    Returns:
        The mining and the held-out documents, in a fixed order, without duplicates.

    Raises:
        ExtractError: When the folder holds no standard library.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    if not (stdlib / "ast.py").is_file():
        raise ExtractError(f"no standard library sources in {stdlib}")
    topics = read_topics(stdlib)
    modules = list(find_modules(stdlib))
    reader = SectionReader(seen=set())
    sides: list[list[Document]] = []
    texts: set[str] = set()
    for heldout in (False, True):  # the mining side first: it keeps what both sides have
        found: list[Document] = []
        for name, text in topics.items():
            group = f"topic:{name}"
            if is_heldout(group) == heldout:
                found.extend(documents_of(group, group, [clean(text)]))
        for module, path in modules:
            group = group_of_module(module)
            if is_heldout(group) == heldout and (tree := parse_source(path)) is not None:
                sections = list(reader.read(module, tree))
                found.extend(documents_of(group, f"module:{module}", sections))
        side: list[Document] = []
        for document in found:
            if document.text not in texts:
                texts.add(document.text)
                side.append(document)
        sides.append(side)
    return sides[0], sides[1]


# --- Command line ---------------------------------------------------------------------------


def write_jsonl(path: Path, documents: list[Document]) -> None:
    """Write documents to a temporary sibling and rename it, so the file is whole or absent.

    Args:
        path: The file to write.
        documents: What to write.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            for document in documents:
                record = {"id": document.id, "text": document.text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_corpus(folder: Path, *, stdlib: Path | None = None, force: bool = False) -> str:
    """Extract the corpus and write both sides.

    Args:
        folder: Where ``mining.jsonl`` and ``heldout.jsonl`` go; made where missing.
        stdlib: The standard library's folder; this interpreter's own where left out.
        force: Replace existing files.

    Returns:
        A one-line summary.

    Raises:
        ExtractError: When a file exists and ``force`` is not given, or extraction fails.
    """
    names = ("mining", "heldout")
    paths = [folder / f"{name}.jsonl" for name in names]
    for path in paths:
        if path.exists() and not force:
            raise ExtractError(f"{path} exists; use --force to replace it")
    sides = extract(stdlib)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, path, documents in zip(names, paths, sides, strict=True):
        write_jsonl(path, documents)
        characters = sum(len(document.text) for document in documents)
        parts.append(f"{name}: {len(documents):,} documents, {characters:,} characters")
    return "; ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process where left out.

    Returns:
        The exit status: 0, or 1 after a one-line error.
    """
    parser = argparse.ArgumentParser(
        description="Extract CPython's own documentation as a mining and a held-out corpus."
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--stdlib", type=Path, help="standard library to read (default: own)")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    args = parser.parse_args(argv)
    try:
        summary = write_corpus(args.output, stdlib=args.stdlib, force=args.force)
    except (ExtractError, OSError) as error:
        sys.stderr.write(f"python_docs: {error}\n")
        return 1
    sys.stderr.write(f"python_docs: {summary}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
