import contextvars
import fcntl
import os
import stat
from pathlib import Path

import pytest

from vocabext.errors import UsageError
from vocabext.files import atomic, folders
from vocabext.files.atomic import atomic_file, temporary_path
from vocabext.files.folders import locked, new_folder, scratch_folder


def no_locks(*_: object) -> None:
    raise OSError(atomic.NO_LOCKS[0], "no locks here")


def test_a_link_under_the_name_of_a_temporary_file_is_not_written_through(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(other)
    names = []
    for _ in range(2):
        with atomic_file(tmp_path / "a.json") as file:
            names.append(file.buffer.raw.name)
            file.write("new")
    assert names[0] != names[1]
    assert other.read_text() == "mine"
    assert (tmp_path / f".a.json.{os.getpid()}.tmp").is_symlink()


def test_a_temporary_name_that_is_taken_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").symlink_to(tmp_path / "other")
    monkeypatch.setattr(atomic, "temporary_path", lambda path: tmp_path / "taken")
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "a.json"):
        pass
    assert not (tmp_path / "other").exists()


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    dead, another = temporary_path(tmp_path / "a.json"), temporary_path(tmp_path / "b.json")
    for path in (dead, another):
        path.write_text("half")
    with atomic_file(tmp_path / "a.json") as file:
        file.write("whole")
        with atomic_file(tmp_path / "a.json") as second:  # a live one is nobody else's
            second.write("other")
    assert (tmp_path / "a.json").read_text() == "whole"
    assert not dead.exists()
    assert another.exists()


def test_without_locks_only_old_files_are_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    old, fresh = temporary_path(tmp_path / "a.json"), temporary_path(tmp_path / "a.json")
    for path in (old, fresh):
        path.write_text("half")
    os.utime(old, (0, 0))
    with atomic_file(tmp_path / "a.json") as file:
        file.write("whole")
    assert sorted(tmp_path.iterdir()) == sorted([fresh, tmp_path / "a.json"])


def test_a_file_and_its_name_are_on_disk_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)), sync(fd)))
    with atomic_file(tmp_path / "a.json") as file:
        file.write("x")
    assert synced == [False, True]


def test_a_private_file_stays_private_when_it_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("x")
    (tmp_path / "a.json").chmod(0o600)
    with atomic_file(tmp_path / "a.json") as file:
        file.write("y")
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", [".new.tmp", ".new.old", ".new.lock", ".new.offloaded"])
def test_a_folder_or_file_of_the_user_is_never_deleted(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / name, tmp_path / "deep" / name):
        path.parent.mkdir(exist_ok=True)
        path.mkdir()
        (path / "notes").write_text("mine")
    with new_folder(tmp_path / "new", force=False) as folder, scratch_folder(tmp_path / "new"):
        (folder / "a").write_text("x")
    (tmp_path / "deep" / name / "notes").rename(tmp_path / "deep" / "notes")
    (tmp_path / "deep" / name).rmdir()
    (tmp_path / "deep" / "notes").rename(tmp_path / "deep" / name)
    with new_folder(tmp_path / "deep" / "new", force=False):
        pass
    assert (tmp_path / name / "notes").read_text() == "mine"
    assert (tmp_path / "deep" / name).read_text() == "mine"


def test_an_old_folder_that_a_killed_process_moved_aside_comes_back(tmp_path: Path) -> None:
    old = temporary_path(tmp_path / "new", "old")
    old.mkdir()
    temporary_path(tmp_path / "new").mkdir()
    (old / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new", force=True):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "a").read_text() == "old"


@pytest.mark.parametrize("with_locks", [True, False])
def test_the_second_process_is_told_and_nothing_is_left(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_locks: bool) -> None:
    if not with_locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)

    def second() -> None:
        with new_folder(tmp_path / "new", force=True):
            raise AssertionError

    with locked(tmp_path / "new"), new_folder(tmp_path / "new", force=False) as folder:
        with pytest.raises(UsageError, match=rf"another process \({os.getpid()} on \S+\) is writing .*new right now"):
            contextvars.Context().run(second)  # where nothing is held, as in another process
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_without_locks_a_dead_process_holds_nothing_and_another_machine_may(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = tmp_path / ".new.vocabext.lock"
    lock.write_text(f"99999999999 {folders.socket.gethostname()} 0123456789abcdef\n")
    with locked(tmp_path / "new"):
        pass
    assert not lock.exists()
    lock.write_text("1 elsewhere 0123456789abcdef\n")
    said = r"\(1 on elsewhere\).*if it is gone, delete .*\.lock"
    with pytest.raises(UsageError, match=said), locked(tmp_path / "new"):
        pass


def test_a_lock_that_vocabext_has_not_written_is_neither_followed_nor_deleted(tmp_path: Path) -> None:
    lock = tmp_path / ".new.vocabext.lock"
    for make in (lambda: lock.symlink_to(tmp_path / "other"), lambda: lock.write_text("mine"), lock.mkdir,
                 lambda: os.mkfifo(lock)):
        make()
        with pytest.raises(UsageError, match="move it away"), locked(tmp_path / "new"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [lock.name]
        atomic.remove(lock)
