"""Kill our commands at random moments and run them again: `kills.py [WORK...] --kills 50 [--seed N]`.

A killed process is a fork of this one, which has everything imported but has computed nothing: so a kill costs no
start. Half of the kills come after a random time, half at a random one of the moments in which the process opens,
makes, renames or removes a file, which are the moments that matter. After each kill nothing under the
output's name may be unfinished; then the work is done again, must succeed, and may leave nothing else behind.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama as _llama  # imported before the forks, not in each of them
from tiny_checkpoints import tiny_folder
from tiny_expanded import DOCUMENTS, new_tokens

from vocabext.checkpoint.folder import Rows, open_checkpoint, save_rows
from vocabext.checkpoint.manifest import base_record
from vocabext.checkpoint.rows import mean_rows
from vocabext.files.atomic import unfinished
from vocabext.options import CollectConfig, DistillConfig, EvalConfig, MineConfig
from vocabext.patch.stage import patch
from vocabext.revert import revert
from vocabext.run import RunConfig, run
from vocabext.tokenizer import load_tokenizer
from vocabext.verify import stage as verification

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")
# The digests in verify.json are of vocabext.json, too.
DATED = {"vocabext.json": ("created",), "verify.json": ("seconds", "files"), "eval.json": ("seconds",)}
assert _llama


@dataclass(frozen=True)
class Work:
    """Something that can be killed.

    Attributes:
        prepare: Makes what the work reads, in a folder.
        do: Does the work there; its output is `new` in that folder.
        others: What else may lie in the folder afterwards.
        compared: Whether two runs make the same bytes.
    """

    prepare: Callable[[Path], object]
    do: Callable[[Path], object]
    others: tuple[str, ...]
    compared: bool = True


def _base(folder: Path) -> None:
    base = tiny_folder(folder / "base", sharded=True, tied=False, num_rows=291)
    tokens, checkpoint = new_tokens(base), open_checkpoint(base)
    matrix = checkpoint.read("model.embed_tokens.weight")
    made_from = base_record(base, checkpoint.names, model=str(base), first_new_id=load_tokenizer(base).first_new_id)
    save_rows(folder / "rows.safetensors", tokens, Rows(mean_rows(matrix, tokens)),
              {"method": "mean", "base": made_from})


def _expanded(folder: Path) -> None:
    _base(folder)
    patch(folder / "rows.safetensors", str(folder / "base"), folder / "expanded")


def _replaced(folder: Path) -> None:
    _base(folder)
    tiny_folder(folder / "new")


def _corpus(folder: Path) -> None:
    tiny_folder(folder / "base")
    for name, documents in (("corpus", DOCUMENTS[:2]), ("heldout", DOCUMENTS[2:])):
        lines = (json.dumps({"text": document.text}) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines))


def _run(folder: Path) -> None:
    verification.NUM_ADVERSARIAL = 50
    run(RunConfig(
        model=str(folder / "base"), corpus=(str(folder / "corpus.jsonl"),), heldout=(str(folder / "heldout.jsonl"),),
        output=folder / "new", mine=MineConfig(dedup=False, budget=5, min_count=4),
        collect=CollectConfig(snippets=6, window=24, min_snippets=2),
        distill=DistillConfig(epochs=2, dtype="float32", device="cpu"),
        evaluate=EvalConfig(prompts=1, continuation=2, context=48, dtype="float32", device="cpu")))


def _patched(folder: Path, *, force: bool = False, link: str = "copy") -> None:
    patch(folder / "rows.safetensors", str(folder / "base"), folder / "new", force=force, link=link)


WORKS = {
    "patch": Work(_base, _patched, ("base", "rows.safetensors")),
    "patch --force": Work(_replaced, lambda folder: _patched(folder, force=True), ("base", "rows.safetensors")),
    "patch --link hard": Work(_base, lambda folder: _patched(folder, link="hard"), ("base", "rows.safetensors")),
    "revert": Work(_expanded, lambda folder: revert(folder / "expanded", folder / "new", link="copy"),
                   ("base", "expanded", "rows.safetensors")),
    "run": Work(_corpus, _run, ("base", "corpus.jsonl", "heldout.jsonl", "new-work"), compared=False),
}


# -- processes ----------------------------------------------------------------------------------------------------

def fork(work: Callable[[], object]) -> int:
    """Do something in a fork of this process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def finish(work: Callable[[], object]) -> float:
    """Do something in a fork, to its end; returns the seconds.

    Raises:
        SystemExit: If it fails.
    """
    began = time.monotonic()
    _, status = os.waitpid(fork(work), 0)
    if status:
        raise SystemExit(f"the work failed ({os.waitstatus_to_exitcode(status)})")
    return time.monotonic() - began


def count_events(stop_at: int | None, seen: Path | None = None) -> None:
    """Count moments of this process that touch files; die in one of them, or write their number down each time."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in FILE_EVENTS or (event == "open" and _reads(arguments)):
            return
        count += 1
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if seen is not None:
            descriptor = os.dup(counted)
            os.pwrite(descriptor, str(count).encode(), 0)
            os.close(descriptor)

    counted = os.open(seen, os.O_WRONLY | os.O_CREAT) if seen is not None else -1
    sys.addaudithook(hook)


def _reads(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 else 0
    return isinstance(flags, int) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


# -- what must hold -----------------------------------------------------------------------------------------------

def contents(folder: Path) -> dict[str, str]:
    """Digests of all files of a folder; what says when or how fast it was made does not count."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            raw = path.read_bytes()
            if path.name in DATED and path.parent == folder:
                document = json.loads(raw)
                for key in DATED[path.name]:
                    document.pop(key, None)
                raw = json.dumps(document, sort_keys=True).encode()
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(raw).hexdigest()
    return found


def check_after_kill(folder: Path, old: dict[str, str] | None, wanted: dict[str, str] | None, others: set[str]) -> str:
    """Look at what a killed process left: the output is whole, or as before, or not there.

    Args:
        folder: Where it worked.
        old: What the output held before, None if it was not there.
        wanted: What it holds in the end; None if that differs from run to run.
        others: What else may lie there under a name of its own.

    Returns:
        What was found: `new`, `old` or `nothing`.
    """
    names = {path.name for path in folder.iterdir()}
    strays = {name for name in names - others - {"new"} if not name.startswith((".new.", ".new-work."))}
    assert not strays, f"left under a name of its own: {strays}"
    if "new" not in names:
        aside = next(unfinished(folder, "new", "old"), None)
        assert old is None or (aside is not None and contents(aside) == old), "the old folder is lost"
        return "nothing"
    if wanted is None:
        open_checkpoint(folder / "new")
        return "new"
    now = contents(folder / "new")
    assert now in (wanted, old), "the output is neither the new folder nor the old one"
    return "new" if now == wanted else "old"


def kill_and_repeat(name: str, kills: int, seed: int) -> dict[str, int]:
    """Kill a piece of work again and again, and finish it each time.

    Returns:
        How often which state was found after a kill, and how often the process was done before it.
    """
    work, chance = WORKS[name], random.Random(f"{name} {seed}")
    found = {"kills": 0, "new": 0, "old": 0, "nothing": 0, "too late": 0}
    with tempfile.TemporaryDirectory() as scratch:
        model, place, seen = (Path(scratch) / part for part in ("model", "place", "seen"))
        model.mkdir()
        finish(lambda: work.prepare(model))
        shutil.copytree(model, place)
        seconds = finish(lambda: work.do(place))
        wanted = contents(place / "new") if work.compared else None
        shutil.rmtree(place)
        shutil.copytree(model, place)
        finish(lambda: (count_events(None, seen), work.do(place)))
        events = int(seen.read_text())
        old = contents(model / "new") if (model / "new").exists() else None
        while found["kills"] < kills:
            shutil.rmtree(place)
            shutil.copytree(model, place)
            at = chance.randint(1, events) if found["kills"] % 2 else None
            pid = fork(lambda at=at: (count_events(at), work.do(place)))  # type: ignore[misc]
            if at is None:
                time.sleep(chance.uniform(0, seconds))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                assert os.waitstatus_to_exitcode(status) == 0, f"{name} failed before it was killed"
                found["too late"] += 1
                continue
            found["kills"] += 1
            others = {*work.others, *(["new-work"] if name == "run" else [])}
            state = check_after_kill(place, old, wanted, others)
            found[state] += 1
            if state == "new" and name.startswith(("patch", "revert")):
                shutil.rmtree(place / "new")  # it is done, and would be refused
            finish(lambda: work.do(place))
            left = {path.name for path in place.iterdir()} - {*work.others, "new"}
            assert not left, f"left behind after the second run: {left}"
            temporary = [path.name for path in place.rglob(".*.tmp")]
            assert not temporary, f"left behind after the second run: {temporary}"
            assert wanted is None or contents(place / "new") == wanted, "the second run made something else"
    return found


def main() -> None:
    """Kill, and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.works or WORKS:
        sys.stdout.write(json.dumps({name: kill_and_repeat(name, arguments.kills, arguments.seed)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
