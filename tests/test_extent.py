"""Ranges of bytes in files, a chunk at a time."""

import hashlib
from pathlib import Path

import pytest

from vocabext.errors import CheckpointError
from vocabext.files import ranges
from vocabext.files.ranges import Extent, first_difference, read_scattered, same_inode

DATA = bytes(range(256)) * 5


@pytest.fixture(autouse=True, params=[1, 7, 100, 10**6])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "READ_BYTES", request.param)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_an_extent_is_read_whole_and_in_order(tmp_path: Path) -> None:
    extent = Extent(write(tmp_path / "a", DATA), 3, 500)
    assert b"".join(extent.chunks()) == DATA[3:503]
    counted: list[int] = []
    assert extent.sha256(counted.append) == hashlib.sha256(DATA[3:503]).hexdigest()
    assert sum(counted) == 500


@pytest.mark.parametrize("place", [0, 6, 7, 499, 1279])
def test_the_first_difference_is_found(tmp_path: Path, place: int) -> None:
    other = bytearray(DATA)
    other[place] ^= 1
    left, right = Extent.whole(write(tmp_path / "a", DATA)), Extent.whole(write(tmp_path / "b", bytes(other)))
    assert first_difference(left, right) == place
    assert first_difference(left, left) is None


def test_a_shorter_file_differs_at_its_end(tmp_path: Path) -> None:
    left, right = Extent.whole(write(tmp_path / "a", DATA)), Extent.whole(write(tmp_path / "b", DATA[:700]))
    assert first_difference(left, right) == first_difference(right, left) == 700


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    extent = Extent(write(tmp_path / "a", DATA), 0, len(DATA) + 1)
    with pytest.raises(CheckpointError, match="became shorter"):
        list(extent.chunks())


def test_hard_links_are_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a", DATA)
    (tmp_path / "b").hardlink_to(path)
    assert same_inode(path, tmp_path / "b")
    assert not same_inode(path, write(tmp_path / "c", DATA))


def test_scattered_places_are_read_and_a_file_that_ends_before_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a", DATA)
    assert read_scattered(path, [7, 3, 1270], 10) == DATA[7:17] + DATA[3:13] + DATA[1270:1280]
    with pytest.raises(CheckpointError, match="became shorter"):
        read_scattered(path, [1271], 10)
