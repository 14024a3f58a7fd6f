"""Folders that are damaged or hostile: one clear line, no crash, nothing read outside the folder."""

import contextlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_case import EMBEDDING, Case, make_case
from tiny_checkpoints import edit_header, edit_json, tiny_folder

from vocabext.checkpoint.folder import INDEX_NAME, WEIGHTS_NAME, open_checkpoint, open_rows
from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.shards import read_shard
from vocabext.checkpoint.vocabulary import other_dimensions
from vocabext.errors import CheckpointError, UsageError, VocabextError

CODE = (".py", ".pyc", ".so")


def write_header(path: Path, raw: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "m")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "m", sharded=True)


@pytest.fixture
def reads() -> Iterator[list[str]]:
    """The paths that are opened from now on."""
    opened: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event == "open" and isinstance(arguments[0], str) and not arguments[0].endswith(CODE):
            opened.append(arguments[0])

    sys.addaudithook(hook)
    yield opened
    watching[0] = False  # a hook cannot be taken away, only be told to look away


# -- headers ------------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(("header", "words"), [
    ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [2, 6]}}, "b starts at byte 2, the tensor before ends at 4"),
    ({"a": {**ENTRY, "data_offsets": [4, 8]}}, "a starts at byte 4"),
    ({"a": {**ENTRY, "data_offsets": [4, 0]}}, "truncated"),
    ({"a": {**ENTRY, "data_offsets": [0, 10**30]}}, "truncated"),
    ({"a": {**ENTRY, "shape": [10**30]}}, "needs 4" + "0" * 30),
    ({"a": {**ENTRY, "shape": [True]}}, "damaged"),
    ({"a": {**ENTRY, "shape": [1.0]}}, "damaged"),
    ({"a": {**ENTRY, "data_offsets": [0, 4, 8]}}, "damaged"),
    ({"a": [1]}, "damaged"),
    ({"a": ENTRY, "__metadata__": {"format": 3}}, "damaged"),
    ({"a": ENTRY, "__metadata__": ["format"]}, "damaged"),
    (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', "damaged"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}', "damaged"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 3}', "damaged"),
    (b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 4]}}', "damaged"),
    ('{"ä": 1}'.encode("latin-1"), "damaged"),
    ('{"a": {}}'.encode("utf-16"), "damaged"),
    (b"[" * 100_000, "damaged"),
])
def test_a_header_that_makes_no_sense(tmp_path: Path, header: Any, words: str) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_header(tmp_path / WEIGHTS_NAME, raw, b"12345678")
    with pytest.raises(CheckpointError, match=words) as caught:
        read_shard(tmp_path, WEIGHTS_NAME)
    assert "\n" not in str(caught.value)


def test_a_header_larger_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / WEIGHTS_NAME, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # a hole
    with pytest.raises(CheckpointError, match="header of 200000000 bytes; the format allows 100000000"):
        read_shard(tmp_path, WEIGHTS_NAME)


NUMBERS = st.one_of(st.integers(-8, 40), st.sampled_from([2**31, 2**63, 2**64, 10**30]), st.booleans(), st.none(),
                    st.floats(), st.text(max_size=3))
ENTRIES = st.one_of(NUMBERS, st.fixed_dictionaries({}, optional={
    "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "F4", "BOOL"]), NUMBERS),
    "shape": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
    "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS)}))
HEADERS = st.dictionaries(st.one_of(st.sampled_from([EMBEDDING, "__metadata__", "a"]), st.text(max_size=4)), ENTRIES,
                          max_size=4)


@pytest.mark.slow
@settings(max_examples=examples(400))
@given(HEADERS, st.binary(max_size=40), st.integers(-3, 3))
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes, wrong: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    raw = json.dumps(header).encode()
    (folder / WEIGHTS_NAME).write_bytes(struct.pack("<q", max(0, len(raw) + wrong)) + raw + data)
    with contextlib.suppress(CheckpointError):
        shard = read_shard(folder, WEIGHTS_NAME)
        # Whatever is accepted covers the data without gaps and without overlaps.
        assert sum(info.num_bytes for info in shard.tensors.values()) + shard.data_start == 8 + len(raw) + len(data)
    with contextlib.suppress(CheckpointError, UsageError):
        open_rows(folder / WEIGHTS_NAME)


# -- index --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/../../b", "sub/x", 3, None,
                                  [], {}, "a\\b", "a\0b", "x" * 5000, "C:\\x"])
def test_an_index_that_names_no_file_of_the_folder(sharded: Path, file: Any, reads: list[str]) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"][EMBEDDING] = file
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    reads.clear()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    assert "\n" not in str(caught.value)
    assert {Path(path).resolve().parent for path in reads} == {sharded.resolve()}


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[]", b"null", b'{"weight_map": []}', b'{"weight_map": {}}', b"{",
                                  b"[" * 100_000, b'{"weight_map": {"a": NaN}}'])
def test_an_index_that_is_none(sharded: Path, text: bytes) -> None:
    (sharded / INDEX_NAME).write_bytes(text)
    with pytest.raises(CheckpointError):
        open_checkpoint(sharded)


def test_an_index_that_names_a_tensor_that_is_nowhere(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["phantom"] = index["weight_map"][EMBEDDING]
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"says that phantom is in model-.*, but it is not there"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("total", ["NaN", "Infinity", '"many"', "null"])
def test_totals_that_are_no_numbers_are_left_alone(tmp_path: Path, total: str) -> None:
    case = make_case(tmp_path, sharded=True, num_rows=290)
    text = (case.base / INDEX_NAME).read_text()
    number = json.loads(text)["metadata"]["total_size"]
    (case.base / INDEX_NAME).write_text(text.replace(f'"total_size": {number}', f'"total_size": {total}'))
    case.patch()
    assert f'"total_size": {total}' in (case.output / INDEX_NAME).read_text()


# -- config, links, manifest --------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {"vocab_size": "many"}, {"vocab_size": -1}, {"vocab_size": 1.5}, {"hidden_size": []}, {"num_hidden_layers": -1},
    {"num_attention_heads": 0}, {"architectures": 3}, {"architectures": [3]}, {"model_type": 7}, {"text_config": 3},
    {"num_hidden_layers": 10**7}])
def test_a_config_that_describes_no_model(folder: Path, changes: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **changes)
    with contextlib.suppress(CheckpointError):  # what does not matter to the class may pass
        open_checkpoint(folder)
        assert changes.keys() <= {"text_config", "architectures"}


@pytest.mark.parametrize("text", [b"\xff\xfe{}", b'{"vocab_size": NaN}', b"3", b'"text"'])
def test_a_config_that_is_no_object(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_sizes_in_lists_are_no_numbers() -> None:
    assert other_dimensions({"hidden_size": 8, "intermediate_size": [96, 96], "num_attention_heads": 2}) >= {8, 24, 32}


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_NAME, "tokenizer.json"])
def test_links_in_a_circle(tmp_path: Path, name: str) -> None:
    case = make_case(tmp_path)
    (case.base / name).unlink()
    (case.base / name).symlink_to(name)
    with pytest.raises(VocabextError) as caught:
        case.patch()
    assert "\n" not in str(caught.value)
    assert not case.output.exists()


def test_folders_that_are_links_in_a_circle(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    circle = tmp_path / "circle"
    for changed in (Case(circle, case.rows, case.output), Case(case.base, circle, case.output),
                    Case(case.base, case.rows, circle)):
        with pytest.raises(UsageError):
            changed.patch()


def test_a_folder_that_holds_a_link_to_itself(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    (case.base / "again").symlink_to(case.base)
    assert case.patch().files.left_out == {"again/": "a link to another folder"}


@pytest.mark.parametrize("where", [("files", "carried_over"), ("files", "rewritten"), ("originals", "carried_over"),
                                   ("originals", "files"), ("originals", "shards")])
@pytest.mark.parametrize("path", ["/etc/passwd", "../base/config.json"])
def test_a_manifest_that_leads_out_of_the_folder(tmp_path: Path, where: tuple[str, str], path: str) -> None:
    case = make_case(tmp_path)
    case.patch()
    manifest = json.loads((case.output / "vocabext.json").read_text())
    place = manifest[where[0]][where[1]]
    place.append(path) if isinstance(place, list) else place.update({path: next(iter(place.values()), {
        "num_bytes": 1, "sha256": None, "stored": "x"})})
    (case.output / "vocabext.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        read_manifest(case.output)


def test_a_manifest_of_numbers_that_are_none(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    case.patch()
    text = (case.output / "vocabext.json").read_text()
    (case.output / "vocabext.json").write_text(text.replace('"num_rows": 300', '"num_rows": Infinity'))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(case.output)


def test_tensors_of_another_rank_or_width_are_refused(folder: Path) -> None:
    for shape in ([300 * 64], [300, 64, 1], [150, 128], [300, 8, 8], []):
        edit_header(folder / WEIGHTS_NAME, lambda header, shape=shape: header[EMBEDDING].update(shape=shape))
        with pytest.raises(CheckpointError, match=r"shape|rows"):
            open_checkpoint(folder)
