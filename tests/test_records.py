import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabext.errors import OutputExistsError, UsageError
from vocabext.files.atomic import atomic_file, check_output, write_json
from vocabext.files.jsonl import FORMAT_VERSION, read_jsonl, write_jsonl
from vocabext.tokens import NewToken, TokenSnippets

TOKENS = st.builds(NewToken, st.text(), st.text(), st.lists(st.integers(0, 99), min_size=2).map(tuple),
                   st.integers(0), st.integers(0))


@given(token=TOKENS)
def test_a_token_survives_the_file(token: NewToken) -> None:
    assert NewToken.from_json(json.loads(json.dumps(token.to_json()))) == token


@given(token=TOKENS, snippets=st.lists(st.lists(st.integers(0, 9)).map(tuple)).map(tuple), number=st.integers(0, 9))
def test_snippets_survive_the_file(token: NewToken, snippets: tuple[tuple[int, ...], ...], number: int) -> None:
    record = TokenSnippets(token, snippets, tuple(range(len(snippets))), number + 5, number)
    assert TokenSnippets.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_token_without_snippets_reads_as_one() -> None:
    token = NewToken(" a b", "Ġa Ġb", (1, 2), 3, 4)
    assert TokenSnippets.from_json(token.to_json()) == TokenSnippets(token)


def test_an_artifact_is_a_header_and_rows(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.jsonl", [{"token": "\u2028\x85é"}, {"token": "\n"}]
    write_jsonl(path, "candidates", {"base": {"model": "m"}}, rows)
    header, found = read_jsonl(path, ("candidates", "snippets"))
    assert header == {"artifact": "candidates", "version": FORMAT_VERSION, "base": {"model": "m"}}
    assert found == rows
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds nothing that vocabext wrote, but 'candidates' .from `vocabext mine`. is needed here"),
        ("[1]\n", "holds nothing that vocabext wrote, but 'candidates'"),
        ('{"artifact": "snippets", "version": 1}\n', "holds 'snippets', but 'candidates' .from"),
        ('{"artifact": "candidates", "version": 99}\n', "has format version 99, this vocabext reads 1; make the file"),
        ("plain text\n", "is not a JSON Lines file of vocabext"),
        ("\udcff", "is not a JSON Lines file of vocabext"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=message):
        read_jsonl(path, ("candidates",))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "a.jsonl", tmp_path):
        with pytest.raises(UsageError, match="does not exist or is not a file"):
            read_jsonl(path, ("candidates",))


def test_an_output_is_never_replaced_without_force(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    check_output(path, force=False)
    path.write_text("old")
    with pytest.raises(OutputExistsError, match=r"out.json exists already; choose another output, or pass --force"):
        check_output(path, force=False)
    check_output(path, force=True)
    with pytest.raises(UsageError, match="is a folder, but a file is written here"):
        check_output(tmp_path, force=True)
    check_output(tmp_path, force=True, folder=True)
    with pytest.raises(UsageError, match=r"the folder .*missing does not exist; create it"):
        check_output(tmp_path / "missing" / "out.json", force=True)


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})

    def rows():  # type: ignore[no-untyped-def]  # noqa: ANN202
        yield {"token": "one"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, "candidates", {}, rows())
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_a_full_disk_leaves_nothing_and_names_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_json(tmp_path / "out.json", {"a": 1})
    assert caught.value.filename == str(tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, but a file is written here"), atomic_file(tmp_path):
        pass
