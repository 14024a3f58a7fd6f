"""The check of `verify` that asks vLLM: its verdicts on given answers, and on a real engine."""

import importlib.util
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import EMBEDDING, detail, draw_fewer_texts, edit_tensor, failed, opened, skipped
from tiny_expanded import expanded_pair

from vocabext.verify import engine
from vocabext.verify.pair import FaultError, NotCheckedError, Pair
from vocabext.verify.stage import verify

VLLM = "loads in vLLM, same greedy output"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return expanded_pair(tmp_path_factory.mktemp("pair"), dtype=torch.float32)


@pytest.fixture
def pair(sound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return opened(*sound)


def answer(ids: list[int], **likely: float) -> dict[str, Any]:
    return {"ids": ids, "logprobs": [{"5": -1.0, "6": -1.0 - likely.get("gap", 1.0)} for _ in ids]}


def give(monkeypatch: pytest.MonkeyPatch, pair: Pair, base: dict[str, Any], new: dict[str, Any]) -> None:
    def written(_: Pair, folder: Path, rows: list[list[int]]) -> list[dict[str, Any]]:
        return [new if folder == pair.folder else base for _ in rows]

    monkeypatch.setattr(engine, "_written", written)


def test_the_same_output_passes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, pair, answer([5, 5, 6]), answer([5, 5, 6]))
    assert engine.same_greedy(pair, True) == "vLLM continues 6 texts by the same 24 ids as with the base"


def test_other_output_fails_and_a_tie_does_not(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, pair, answer([5, 5]), answer([5, 6]))
    with pytest.raises(FaultError, match="vLLM writes the id 6 at place 1, with the base 5"):
        engine.same_greedy(pair, True)
    give(monkeypatch, pair, answer([5, 5], gap=1e-6), answer([5, 6]))
    assert engine.same_greedy(pair, True).endswith("; 6 parted where two ids are equally likely")
    give(monkeypatch, pair, answer([5, 5]), answer([5, 7]))  # not even among the likeliest
    with pytest.raises(FaultError, match="writes the id 7"):
        engine.same_greedy(pair, True)


def test_what_prevents_the_check_is_said(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotCheckedError, match="not asked for; pass --vllm"):
        engine.same_greedy(pair, False)

    def dies(*args: object, **options: Any) -> Any:
        options["stdout"].write(b"loading\nValueError: no such architecture\nshutting down\n")
        return subprocess.CompletedProcess([], 1)

    monkeypatch.setattr(subprocess, "run", dies)
    with pytest.raises(NotCheckedError, match=r"cannot load .*base: ValueError: no such architecture \(exit code 1\), "
                                              "which is the base"):
        engine.same_greedy(pair, True)
    with pytest.raises(FaultError, match=r"vLLM cannot load .*expanded: ValueError: no such"):
        engine._written(pair, pair.folder, [[1]])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotCheckedError, match="vLLM is not installed"):
        engine.same_greedy(pair, True)


def test_an_engine_that_does_not_answer_in_time_is_no_verdict(
    sound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_fewer_texts(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def hangs(command: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    result = verify(sound[1], str(sound[0]), load_weights=False, use_vllm=True)
    assert failed(result) == []
    assert skipped(result)[VLLM] == f"vLLM did not answer within 3,600 s with {sound[0]}"


@pytest.mark.vllm
@pytest.mark.fuzz
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_separated_head_writes_the_same_in_vllm_and_another_embedding_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_fewer_texts(monkeypatch)
    base, folder = expanded_pair(tmp_path, untie=True)
    written, answers = engine._written, dict[Path, Future[list[dict[str, Any]]]]()

    def side_by_side(pair: Pair, path: Path, rows: list[list[int]]) -> list[dict[str, Any]]:
        """Ask both engines at once, which takes as long as one; the base's answer is kept."""
        for other in (base, folder):
            if other not in answers:
                answers[other] = pool.submit(written, pair, other, rows)
        return answers[path].result()

    monkeypatch.setattr(engine, "_written", side_by_side)
    with ThreadPoolExecutor(2) as pool:
        result = verify(folder, str(base), load_weights=False, use_vllm=True)
        assert failed(result) == []
        assert detail(result, VLLM).startswith("vLLM continues 6 texts by the same 24 ids as with the base")
        edit_tensor(folder, EMBEDDING, lambda matrix: matrix.copy_(matrix.flip(0)))
        del answers[folder]
        with pytest.raises(FaultError, match="vLLM writes the id"):
            engine.same_greedy(opened(base, folder), True)
