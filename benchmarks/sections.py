"""Sections of docs/benchmarks.md: each is written by the script that measured it, and leaves the others alone."""

import re
from pathlib import Path

from vocabext.files.atomic import atomic_file

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def put_section(path: Path, section: str) -> None:
    """Write a section into a Markdown file: in the place of the one with its title, or at the end.

    Args:
        path: The file; made if it is not there.
        section: Markdown that begins with a title of the second level and has no other.
    """
    assert section.startswith("## "), section[:80]
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Benchmarks\n"
    with atomic_file(path) as file:
        file.write(with_section(text, section))


def with_section(text: str, section: str) -> str:
    """Return a document with a section in it, as `put_section` writes it."""
    new, title = section.strip() + "\n", section.splitlines()[0]
    pattern = re.compile(rf"^{re.escape(title)}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if not pattern.search(text):
        return f"{text.rstrip()}\n\n{new}"
    return pattern.sub(lambda _: f"{new}\n", text).rstrip("\n") + "\n"


def section_of(text: str, title: str) -> str:
    """Return the section with a title of the second level, without the empty lines behind it."""
    found = re.search(rf"^## {re.escape(title)}$.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found.group().strip() + "\n"
