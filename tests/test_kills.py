"""Processes that are killed leave nothing that looks finished, and running them again succeeds: see `kills.py`.

One kill in `make test`, a few in `make fuzz`; `python tests/support/kills.py --kills 50` makes fifty of each.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kills import check_after_kill, contents

from vocabext.files.atomic import remove_unfinished, temporary_path

KILLS = Path(__file__).parent / "support" / "kills.py"


@pytest.mark.slow
@pytest.mark.parametrize(("works", "kills"), [
    (["patch"], 1), pytest.param(["patch", "patch --force", "revert"], 6, marks=pytest.mark.fuzz),
    pytest.param(["run"], 2, marks=pytest.mark.fuzz)])
def test_a_killed_process_leaves_nothing_unfinished_and_can_be_repeated(works: list[str], kills: int) -> None:
    done = subprocess.run([sys.executable, str(KILLS), *works, "--kills", str(kills)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: counts for line in done.stdout.splitlines() for name, counts in json.loads(line).items()}
    assert list(found) == works
    assert all(counts["kills"] == kills for counts in found.values())


def test_what_must_not_be_left_is_found(tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert check_after_kill(tmp_path, None, {}, set()) == "nothing"
    with pytest.raises(AssertionError, match="the old folder is lost"):
        check_after_kill(tmp_path, {"a": "1"}, {}, set())
    new.mkdir()
    (new / "a").write_text("half")
    whole = contents(new)
    assert check_after_kill(tmp_path, None, whole, set()) == "new"
    assert check_after_kill(tmp_path, whole, {}, set()) == "old"
    (new / "a").write_text("hal")
    with pytest.raises(AssertionError, match="neither the new folder nor the old one"):
        check_after_kill(tmp_path, None, whole, set())
    (tmp_path / "other").mkdir()
    with pytest.raises(AssertionError, match="left under a name of its own"):
        check_after_kill(tmp_path, None, whole, set())


def test_files_that_were_being_written_are_removed_and_no_others(tmp_path: Path) -> None:
    for name in (".rows.safetensors.123.tmp", ".notes.tmp", "a.1.tmp", ".hidden"):
        (tmp_path / name).write_text("x")
    mine = sorted(path.name for path in tmp_path.iterdir())
    temporary_path(tmp_path / "rows.safetensors").write_text("half")
    remove_unfinished(tmp_path, "other")
    assert len(list(tmp_path.iterdir())) == len(mine) + 1
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == mine
    remove_unfinished(tmp_path / "missing")
