"""What the documentation says is there: links, anchors, command lines, Python, file formats, metrics."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vocabext.checkpoint.manifest import (
    BaseRecord,
    FileRecord,
    Manifest,
    Original,
    OverwrittenRows,
    TensorRecord,
    TokenRecord,
)
from vocabext.checkpoint.verdicts import Check, Verification
from vocabext.cli.main import cli
from vocabext.mine.stage import read_candidates
from vocabext.tokenizer import check_made_for, load_tokenizer
from vocabext.tokens import NewToken, TokenSnippets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "decisions"]  # no history
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
every_current_page = pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))

# Paths that stand for others.
NO_FILES = {"benchmarks/NAME.py", "benchmarks/NAME.json"}

# Options that pages name and that are not ours: vLLM's, pip's, and those of scripts.
FOREIGN_OPTIONS = {"--logits-processors", "--served-model-name", "--exclude-tools-when-tool-choice-none", "--help"}


# ---- reading Markdown ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code: its language and its lines."""

    language: str
    text: str


@cache
def split(page: Path) -> tuple[str, tuple[Block, ...]]:
    """Return the prose of a page, and its blocks of code; indented ones have no language."""
    prose: list[str] = []
    blocks: list[Block] = []
    fence: list[str] | None = None
    language = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            if fence is None:
                fence, language = [], line.strip().removeprefix("```").strip()
            else:
                blocks.append(Block(language, "\n".join(fence)))
                fence = None
        elif fence is not None:
            fence.append(line)
        elif line.startswith("    ") and (not prose or not prose[-1].strip() or prose[-1].startswith("    ")):
            blocks.append(Block("", line.strip()))
        else:
            prose.append(line)
    assert fence is None, f"{page}: a block of code has no end"
    return "\n".join(prose), tuple(blocks)


def spans(page: Path) -> list[str]:
    """Return what stands between backticks, on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", split(page)[0])]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", split(page)[0], re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return frozenset(found)


# ---- links ---------------------------------------------------------------------------------------


@every_page
def test_every_link_and_anchor_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`]*`", "", split(page)[0])
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            broken.append(f"{target}: there is no {file.relative_to(ROOT)}")
        elif anchor and anchor not in anchors(file):
            broken.append(f"{target}: no heading of {file.relative_to(ROOT)} has the anchor {anchor}")
        elif page.is_relative_to(ROOT / "docs") and not file.is_relative_to(ROOT / "docs"):
            broken.append(f"{target}: the site has no page outside docs/")
    assert not broken


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", text, re.MULTILINE)
    there = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(named) == sorted(there)


def test_pages_that_sources_name_exist() -> None:
    named = {(path.relative_to(ROOT), name)
             for folder in ("vocabext", "serve", "benchmarks", "examples", "tests")
             for path in (ROOT / folder).rglob("*.py")
             for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8"))}
    assert len(named) > 5
    assert not [f"{path} names {name}" for path, name in sorted(named) if not (ROOT / name).is_file()]


@every_current_page
def test_sources_that_pages_name_exist(page: Path) -> None:
    folders = "vocabext|serve|benchmarks|examples|scripts|tests"
    named = {span for span in spans(page) if re.fullmatch(rf"({folders})/[\w./-]+", span)}
    assert not [name for name in named - NO_FILES if not (ROOT / name).exists()]


def test_the_readme_is_read_in_two_minutes() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 160


def test_the_changelog_has_one_line_for_each_change() -> None:
    entries = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("## [Unreleased]")[2].splitlines()
    assert not [line for line in entries if line and not re.match(r"- |#|[\w`, ]+$", line)]
    assert max(map(len, entries)) <= 140


# ---- command lines -------------------------------------------------------------------------------


def command_lines(block: Block) -> Iterator[list[str]]:
    """Yield the words of every `vocabext ...` command of a block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if not re.match(r"\s*(\$ )?(\.venv/bin/)?vocabext ", line):
            continue
        words: list[str] = []
        for word in shlex.split(line.strip().removeprefix("$ "), comments=True):
            if word in ("|", "&&", ";", ">"):
                break
            words.append(word)
        yield words[1:]


def resolve(words: list[str]) -> tuple[click.Command, click.Context, list[str]]:
    """Follow the verbs of a command line; raises what click raises if there is no such verb."""
    command: click.Command = cli
    context = click.Context(cli, info_name="vocabext")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        _, found, _ = command.resolve_command(context, words)
        assert found is not None
        command, words = found, words[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    return command, context, words


def fault_of(words: list[str], *, whole: bool) -> str:
    """Say what is wrong with a command line, empty if nothing is; nothing is run.

    Args:
        words: What follows `vocabext`.
        whole: Whether arguments and required options must be there, too.
    """
    try:
        command, context, rest = resolve(words)
        if not whole:
            known = options_of(command, context)
            return ", ".join(f"no such option: {word}" for word in rest if word.startswith("-") and word not in known)
        if isinstance(command, click.Group):
            return "" if {"--help", "--version"} & set(rest) else "the verb is missing"
        values, left, _ = command.make_parser(context).parse_args(list(rest))
    except click.ClickException as error:
        return error.format_message()
    if "help" in values:
        return ""
    given = {p: _listed(values.get(p.name or "")) for p in command.params}
    return ", ".join([
        *(f"{p.opts[0]} is missing" for p, found in given.items() if p.required and not found),
        *(f"no such choice: {p.opts[0]} {value}" for p, found in given.items() if isinstance(p.type, click.Choice)
          for value in found if value not in p.type.choices),
        *(f"too much: {word}" for word in left)])


def _listed(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list | tuple) else [value] if isinstance(value, str) else []


@every_page
def test_every_command_line_parses(page: Path) -> None:
    if page.name == "cli.md":
        pytest.skip("written from the commands themselves")
    whole = [words for block in split(page)[1] if block.language in ("bash", "") for words in command_lines(block)]
    named = [shlex.split(span)[1:] for span in spans(page) if span.startswith("vocabext ") and "..." not in span
             and "," not in span and page in CURRENT]
    faults = [f"vocabext {shlex.join(words)}: {fault}" for words, is_whole in
              [*((w, True) for w in whole), *((w, False) for w in named)] if (fault := fault_of(words, whole=is_whole))]
    assert not faults


@pytest.mark.parametrize(("line", "fault"), [
    ("mien notes.jsonl", "there is no verb 'mien'; did you mean mine?"),
    ("mine notes.jsonl --model m --budgets 3 -o c.jsonl", "No such option '--budgets'"),
    ("mine --model m -o c.jsonl", "corpus is missing"),
    ("mine notes.jsonl -o c.jsonl", "--model is missing"),
    ("distill s.jsonl --model m -o r.safetensors --method magic", "no such choice: --method magic"),
    ("verify new extra --against base", "too much: extra"),
    ("serve swop", "No such command 'swop'"),
])
def test_a_wrong_command_line_is_found(line: str, fault: str) -> None:
    assert fault in fault_of(shlex.split(line), whole=True)


def options_of(command: click.Command, context: click.Context) -> set[str]:
    found = {name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            found |= options_of(child, context)
    return found


@every_current_page
def test_every_option_that_is_named_exists(page: Path) -> None:
    ours = options_of(cli, click.Context(cli)) | FOREIGN_OPTIONS
    named = [span.split()[0].split("=")[0] for span in spans(page) if re.match(r"--[a-z]", span)]
    assert not [name for name in named if name not in ours and page.name != "benchmarks.md"]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@every_current_page
def test_every_make_target_exists(page: Path) -> None:
    shell = "\n".join(block.text for block in split(page)[1] if block.language == "bash")
    named = {*re.findall(r"^make ([a-z]+)", shell, re.MULTILINE), *(
        span.split()[1] for span in spans(page) if re.match(r"make [a-z]+", span))}
    assert named <= make_targets()


# ---- Python --------------------------------------------------------------------------------------


def names_used(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names below `vocabext` and `serve` that a block imports or uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vocabext":
            yield f"vocabext.{node.attr}"


def exists(name: str) -> bool:
    """Tell whether a dotted name is a module, or something in one."""
    for at in range(name.count(".") + 1):
        module, *rest = [name] if not at else name.rsplit(".", at)
        try:
            found: object = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        for part in rest:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@every_page
def test_every_python_block_compiles_and_uses_names_that_exist(page: Path) -> None:
    for block in split(page)[1]:
        if block.language == "python":
            tree = ast.parse(block.text)
            compile(tree, str(page), "exec")
            used = {name for name in names_used(tree) if name.split(".")[0] in ("vocabext", "serve")}
            assert not [name for name in used if not exists(name)]


@every_page
def test_every_documented_object_exists(page: Path) -> None:
    assert not [name for name in re.findall(r"^::: (\S+)$", split(page)[0], re.MULTILINE) if not exists(name)]


@pytest.mark.slow
def test_the_script_for_a_word_list_makes_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (script,) = (b.text for b in split(ROOT / "docs" / "guides" / "own-words.md")[1] if b.language == "python")
    exec(compile(script, "own-words.md", "exec"), {})
    header, tokens = read_candidates(tmp_path / "candidates.jsonl")
    assert [token.token for token in tokens] == [" asyncio", " coroutine", " asynchronous generator"]
    check_made_for(header, load_tokenizer("examples/model"), tmp_path / "candidates.jsonl")


# ---- reference pages -----------------------------------------------------------------------------

FORMATS = {
    "candidates.jsonl": [NewToken],
    "snippets.jsonl": [TokenSnippets],
    "vocabext.json": [Manifest, BaseRecord, TokenRecord, FileRecord, TensorRecord, Original, OverwrittenRows],
    "verify.json": [Verification, Check],
}


def section(title: str) -> str:
    text = (ROOT / "docs" / "reference" / "file-formats.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}$.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found.group()


@pytest.mark.parametrize("title", FORMATS)
def test_every_field_of_a_file_is_described(title: str) -> None:
    names = {field.name for record in FORMATS[title] for field in dataclasses.fields(record)}
    assert not [name for name in sorted(names - {"new_token"}) if f"`{name}`" not in section(title)]


def test_every_field_of_mined_and_collected_files_is_described(tmp_path: Path) -> None:
    corpus, model = tmp_path / "corpus.jsonl", str(ROOT / "examples" / "model")
    corpus.write_text("".join(json.dumps({"text": f"{i} asynchronous generators, {i} coroutines"}) + "\n"
                              for i in range(30)), encoding="utf-8")
    candidates, snippets = str(tmp_path / "candidates.jsonl"), str(tmp_path / "snippets.jsonl")
    for words in (["mine", str(corpus), "--model", model, "--budget", "2", "-o", candidates],
                  ["collect", candidates, "--corpus", str(corpus), "-o", snippets]):
        outcome = CliRunner().invoke(cli, words, prog_name="vocabext")
        assert outcome.exit_code == 0, outcome.output
    common = section("candidates.jsonl")
    for path, text in ((candidates, common), (snippets, common + section("snippets.jsonl"))):
        header, *rows = (json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines())
        assert len(rows) == 2
        names = {*header, *header["base"], *rows[0]} - {"artifact", "version"}
        assert not [name for name in sorted(names) if f"`{name}`" not in text]


def test_every_field_of_a_rows_file_is_described() -> None:
    from vocabext.distill.input_rows.report import TokenReport
    from vocabext.distill.output_rows.stage import OutputRows, TokenWriting
    from vocabext.distill.stage import DistillResult

    torch = pytest.importorskip("torch")
    names = {*DistillResult(torch.zeros(0, 1), (), 0).summary(), *OutputRows(torch.zeros(0, 1), "none").summary(),
             *(field.name for record in (TokenReport, TokenWriting) for field in dataclasses.fields(record))}
    text = section("rows.safetensors")
    assert not [name for name in sorted(names - {"tokens", "trained"}) if f"`{name}`" not in text]


def test_every_field_of_a_bench_file_is_described() -> None:
    pytest.importorskip("numpy")
    from vocabext.serve.bench.client import Load
    from vocabext.serve.bench.compare import Comparison

    names = {field.name for record in (Load, Comparison) for field in dataclasses.fields(record)} - {"texts"}
    assert not [name for name in sorted(names) if f"`{name}`" not in section("bench.json")]


def test_every_metric_of_the_gateway_is_described() -> None:
    pytest.importorskip("prometheus_client")
    from vocabext.serve.gateway.metrics import Metrics

    page = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    described = dict(re.findall(r"^\| `(vocabext_\w+?)(?:_total)?` \| (\w+) \|", page, re.MULTILINE))
    assert described == {metric.name: metric.type for metric in Metrics().registry.collect()}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "reference" / "python.html").is_file()
