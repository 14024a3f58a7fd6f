"""Writing weights before transformers has been asked: the same folder, the same refusals, and nothing left behind."""

import errno
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_patch import Case, make_case, make_rows
from tiny_checkpoints import edit_json, tiny_folder

from vocabext import links, patch_weights
from vocabext import patch as module
from vocabext.architecture import EmbeddingNames, embedding_names
from vocabext.checkpoint import load_rows, open_checkpoint, open_rows, save_rows
from vocabext.class_record import class_record, known_class, names_from_json, names_to_json
from vocabext.errors import CheckpointError, TokenizerError
from vocabext.imports import without_collecting
from vocabext.links import Copier
from vocabext.manifest import file_sha256

DEADLINE_SECONDS = 20.0
BEFORE_TRANSFORMERS = """
import sys
from pathlib import Path
from vocabext.patch import WeightWriter, patch

def start(*_):
    raise SystemExit("late" if "transformers" in sys.modules else "ahead")

WeightWriter.start = start
patch(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""


def edit_rows(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a rows file."""
    tokens, rows, header = load_rows(path)
    change(header)
    save_rows(path, tokens, rows, header)


def record(case: Case) -> None:
    """Let a rows file say what `distill` says about its base."""
    found = class_record(case.base, embedding_names(case.base))
    edit_rows(case.rows, lambda header: header["base"].update({"class": found}))


def known_case(tmp_path: Path, *, output: bool = False, **options: Any) -> Case:
    case = make_case(tmp_path, **options)
    if output:
        make_rows(case.base, case.rows, output=True)
    record(case)
    return case


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return known_case(tmp_path, tied=False, sharded=True, num_rows=291)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Tell for each call of `patch` whether it had a head start."""
    found: list[bool] = []
    plan = module._plan_ahead

    def ahead(*arguments: Any, **options: Any) -> Any:
        planned = plan(*arguments, **options)
        found.append(planned is not None)
        return planned

    monkeypatch.setattr(module, "_plan_ahead", ahead)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(found["vocabext.json"])
    found["vocabext.json"] = json.dumps({**manifest, "created": ""}).encode()
    return found


def names_left(case: Case) -> list[str]:
    return sorted(path.name for path in case.output.parent.iterdir())


# -- the same result ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"tied": False, "sharded": True, "num_rows": 291}, {"output": True}])
@pytest.mark.parametrize("link", ["auto", "copy"])
def test_a_head_start_changes_no_byte(tmp_path: Path, ways: list[bool], options: dict[str, Any], link: str) -> None:
    case = known_case(tmp_path, **options)
    first = replace(case.patch(link=link), seconds=0)
    ahead = contents(case.output)
    edit_rows(case.rows, lambda header: header["base"].pop("class"))
    assert replace(case.patch(link=link, force=True), seconds=0) == first
    assert ways == [True, False]
    assert contents(case.output) == ahead


def test_the_size_of_a_chunk_changes_no_byte(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.patch()
    large = contents(case.output)
    monkeypatch.setattr("vocabext.shards.REWRITE_BYTES", 1_000)
    case.patch(force=True)
    assert contents(case.output) == large


def test_the_weights_begin_before_transformers_is_imported(case: Case) -> None:
    done = subprocess.run([sys.executable, "-c", BEFORE_TRANSFORMERS, case.rows, case.base, case.output],
                          capture_output=True, text=True, check=False)
    assert done.stderr == "ahead\n"


def test_the_class_is_asked_while_the_weights_are_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, asked = threading.Event(), threading.Event()
    write, ask = patch_weights.write_shard, module.embedding_names

    def write_shard(*arguments: Any) -> Any:
        begun.set()
        assert asked.wait(DEADLINE_SECONDS)
        return write(*arguments)

    def names(*arguments: Any, **options: Any) -> Any:
        assert begun.wait(DEADLINE_SECONDS)
        asked.set()
        return ask(*arguments, **options)

    monkeypatch.setattr(patch_weights, "write_shard", write_shard)
    monkeypatch.setattr(module, "embedding_names", names)
    case.patch()


def test_the_space_that_is_asked_for_is_enough_and_not_wasteful(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "_check_space", lambda _, needed: asked.append(needed))
    written = case.patch(link="copy").bytes_written
    assert written <= asked[0] <= written + 2 * module.MARGIN_BYTES


# -- when there is none -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    lambda base: base["class"].update(transformers="4.0.0"),
    lambda base: base["class"].update(config_sha256="0"),
    lambda base: base["class"].update(config_sha256=None),
    lambda base: base["class"].update(names=None),
    lambda base: base["class"]["names"].pop("tied"),
    lambda base: base.update({"class": "LlamaForCausalLM"}),
    lambda base: base.update({"class": None}),
    lambda base: base.pop("tokenizer_sha256"),
    lambda base: base.pop("num_used_ids"),
])
def test_without_a_record_of_this_base_the_class_is_asked_first(
        case: Case, ways: list[bool], change: Callable[[dict[str, Any]], object]) -> None:
    case.patch()
    ahead = contents(case.output)
    edit_rows(case.rows, lambda header: change(header["base"]))
    case.patch(force=True)
    assert ways == [True, False]
    assert contents(case.output) == ahead


def test_another_config_or_tokenizer_is_another_base(case: Case) -> None:
    file = open_rows(case.rows)
    assert known_class(file, case.base) is not None
    edit_json(case.base / "config.json", rms_norm_eps=1e-3)
    assert known_class(file, case.base) is None
    record(case)
    file = open_rows(case.rows)
    assert known_class(file, case.base) is not None
    edit_json(case.base / "tokenizer.json", version="1.1")
    assert known_class(file, case.base) is None


def test_a_class_whose_code_has_no_version_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "base")
    names = embedding_names(folder)
    assert class_record(folder, names) is not None
    with monkeypatch.context() as context:
        context.setattr("importlib.metadata.version", lambda _: "5.0.0.dev0")
        assert class_record(folder, names) is None
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert class_record(folder, names) is None


NAMES = EmbeddingNames("A", "e.weight", "h.weight", "h.bias", tied=False, num_parameters=9,
                       shapes={"e.weight": (3, 2), "h.weight": (3, 2), "h.bias": (3,), "t": (3, 1)},
                       saved={"h.weight": "o.weight"}, tables={"t": "vocab_size"}, fixed=frozenset("f"),
                       odd=frozenset("o"), first_reserved_id=7)


def test_names_come_back_from_json() -> None:
    assert names_from_json(json.loads(json.dumps(names_to_json(NAMES)))) == NAMES
    plain = EmbeddingNames("A", "e.weight", None, None, tied=False, num_parameters=9, shapes={"e.weight": (3, 2)})
    assert names_from_json(json.loads(json.dumps(names_to_json(plain)))) == plain


@pytest.mark.parametrize("change", [
    {"architecture": None}, {"embedding": ""}, {"embedding": "other"}, {"head": 1}, {"head": None}, {"tied": 1},
    {"num_parameters": True}, {"num_parameters": -1}, {"shapes": []}, {"shapes": {}}, {"saved": {"a": 1}},
    {"shapes": {"e.weight": [3, 2], "h.weight": [3, 2.0], "h.bias": [3], "t": [3, 1]}},
    {"shapes": {"e.weight": [3, 2], "h.weight": [], "h.bias": [3], "t": [3, 1]}},
    {"tables": ["t"]}, {"tables": {}}, {"fixed": "f"}, {"odd": [1]}, {"first_reserved_id": "7"}, {"more": 1},
])
def test_names_that_are_none_are_not_read(change: dict[str, Any]) -> None:
    assert names_from_json({**names_to_json(NAMES), **change}) is None


@pytest.mark.parametrize("value", [None, [], "names", 3])
def test_what_is_no_object_holds_no_names(value: Any) -> None:
    assert names_from_json(value) is None


# -- a record that lies -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("key", "value", "truth", "planned"), [
    ("num_parameters", 7, r"\d+", True), ("architecture", "OtherForCausalLM", "LlamaForCausalLM", True),
    ("tied", True, "False", False)])
def test_a_record_that_lies_is_refused(
        case: Case, ways: list[bool], key: str, value: Any, truth: str, planned: bool) -> None:
    edit_rows(case.rows, lambda header: header["base"]["class"]["names"].update({key: value}))
    with pytest.raises(CheckpointError, match=rf"class of .*base has {key} {value}, but it has {truth}; distill again"):
        case.patch()
    assert ways == [planned]
    assert names_left(case) == ["base", "rows.safetensors"]


def test_rows_that_lie_about_the_tokenizer_are_refused(case: Case, ways: list[bool]) -> None:
    edit_rows(case.rows, lambda header: header["base"].update(num_used_ids=289))
    with pytest.raises(CheckpointError, match=r"made for .* with num_used_ids 289, but .*base has 290"):
        case.patch()
    assert ways == [True]
    assert names_left(case) == ["base", "rows.safetensors"]


def test_what_is_wrong_with_the_base_is_said_as_ever(case: Case, ways: list[bool]) -> None:
    shard = case.base / open_checkpoint(case.base).vocab_info.file
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="is truncated"):
        case.patch()
    assert ways == [False]


# -- errors on either side ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("known", [True, False])
def test_a_shard_that_is_cut_off_meanwhile_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    if not known:
        edit_rows(case.rows, lambda header: header["base"].pop("class"))
    shard = case.base / open_checkpoint(case.base).vocab_info.file

    def cut(*_: object) -> None:
        shard.write_bytes(shard.read_bytes()[:-5])

    monkeypatch.setattr(module, "_check_space", cut)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        case.patch(link="copy")
    assert names_left(case) == ["base", "rows.safetensors"]


@pytest.mark.parametrize("place", [(patch_weights, "write_shard"), (links, "copy_file")])
def test_a_disk_that_fills_up_ends_the_work(
        case: Case, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]) -> None:
    saved: list[object] = []

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def wait(folder: Path, **_: Any) -> EmbeddingNames:
        time.sleep(0.2)  # until the disk is full
        return embedding_names(folder)

    monkeypatch.setattr(*place, full)
    monkeypatch.setattr(module, "embedding_names", wait)
    monkeypatch.setattr("vocabext.tokenizer.save_expanded", lambda *_: saved.append(1))
    with pytest.raises(OSError, match="No space left"):
        case.patch(link="copy")
    assert not saved
    assert names_left(case) == ["base", "rows.safetensors"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, CheckpointError, TokenizerError])
def test_an_error_beside_the_weights_stops_them(
        case: Case, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def write_for_ever(*arguments: Any) -> None:
        began, advance = time.monotonic(), arguments[-1]
        try:
            while time.monotonic() - began < DEADLINE_SECONDS:
                begun.set()
                time.sleep(0.01)
                advance(0)
        except links._StoppedError:
            stopped.set()
            raise

    def fail(*_: Any, **__: Any) -> None:
        assert begun.wait(DEADLINE_SECONDS)
        raise stop("stop")

    monkeypatch.setattr(patch_weights, "write_shard", write_for_ever)
    monkeypatch.setattr(module, "embedding_names", fail)
    with pytest.raises(stop):
        case.patch()
    assert stopped.is_set()
    assert names_left(case) == ["base", "rows.safetensors"]


def fail_with(error: BaseException) -> Callable[..., None]:
    def work(*_: Any) -> None:
        raise error

    return work


def end_with(error: BaseException, copier: Copier, work: Callable[[Callable[[int], object]], object], *,
             wait: bool) -> None:
    """Let a thread do something, and raise beside it: at once, or when it has failed."""
    with copier:
        copier.run(work)
        while wait and copier._error is None:
            time.sleep(0.001)
        raise error


@pytest.mark.parametrize(("later", "seen"), [(ValueError("later"), OSError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_the_first_error_is_the_one_that_is_seen(later: BaseException, seen: type[BaseException]) -> None:
    with pytest.raises(seen):
        end_with(later, Copier(lambda _: None), fail_with(OSError("first")), wait=True)


def test_an_error_that_follows_from_the_end_is_not_seen() -> None:
    def work(advance: Callable[[int], object]) -> None:
        try:
            while True:
                advance(0)
        finally:
            raise OSError("its folder is gone")

    with pytest.raises(ValueError, match="first"):
        end_with(ValueError("first"), Copier(lambda _: None), work, wait=False)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_looked_for_again_afterwards(enabled: bool) -> None:
    @without_collecting()
    def fail() -> None:
        raise ValueError(gc.isenabled())

    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ValueError, match="False"):
            fail()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_the_record_holds_what_it_depends_on(case: Case) -> None:
    found = open_rows(case.rows).header["base"]["class"]
    assert found["config_sha256"] == file_sha256(case.base / "config.json")
    assert found["names"] == names_to_json(embedding_names(case.base))
