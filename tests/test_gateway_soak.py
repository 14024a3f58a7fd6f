"""The check that finds mixed answers, on answers that are: it fires on every way of mixing, and not on a whole one."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from gateway_soak import Answer, Known, faults_of

PROMPT = "ab"


def arm(model: str, first: int, num_ids: int) -> Known:
    """An arm whose ids are letters; the prompt is read differently on each."""
    tokenizer = SimpleNamespace(encode=lambda text: [first] if first else [ord(c) - 96 for c in text],
                                decode=lambda ids, skip_special_tokens: "".join(
                                    PROMPT if i == 50 else chr(96 + i) for i in ids))
    return Known(model, tokenizer, num_ids)


KNOWN = {"base": arm("blue", 0, 50), "expanded": arm("green", 50, 60)}


def part(model: str, token: int, number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"cmpl-{model}", "model": model, "choices": [{"text": chr(96 + token), "token_ids": [token], **(
        {"prompt_token_ids": [1, 2] if model == "blue" else [50]} if number == 0 else {}), **more}]}


def answer(model: str = "blue", name: str = "base", count: int = 4) -> Answer:
    parts = [part(model, 3 + i, i) for i in range(count)]
    usage = {"id": f"cmpl-{model}", "model": model, "choices": [], "usage": {"completion_tokens": count}}
    return Answer(200, name, [*map(json.dumps, [*parts, usage]), "[DONE]"], PROMPT, count)


def test_a_whole_answer_of_one_arm_is_fine() -> None:
    assert faults_of(answer(), KNOWN) == []
    assert faults_of(answer("green", "expanded"), KNOWN) == []


@pytest.mark.parametrize(("change", "fault"), [
    (lambda a: replace(a, arm="expanded"), "mixed: the answer of blue came as the expanded"),
    (lambda a: replace(a, events=[*a.events[:2], *answer("green").events[2:]]), "mixed: 2 different values of id"),
    (lambda a: replace(a, events=[*a.events[:2], *[e.replace("green", "blue") for e in answer("green").events[:1]],
                                  *a.events[3:]]), "mixed: the prompt was read"),
    (lambda a: replace(a, events=a.events[:-1]), "cut: there is no"),
    (lambda a: replace(a, events=[*a.events[:2], *a.events[3:]]), "cut: 3 tokens"),
    (lambda a: replace(a, events=[*a.events[:2], a.events[1], *a.events[2:]]), "duplicated: 5 tokens"),
    (lambda a: replace(a, events=[*a.events, a.events[0]]), "mixed: something follows"),
    (lambda a: replace(a, events=[a.events[0], json.dumps(part("blue", 55, 1)), *a.events[2:]]),
     "mixed: the base arm wrote"),
    (lambda a: replace(a, events=[a.events[0], a.events[1].replace('"text": "d"', '"text": "x"'), *a.events[2:]]),
     "mixed: the text is"),
    (lambda a: replace(a, events=[a.events[0], '{"error": {"message": "gone"}}']), "failed: "),
    (lambda a: replace(a, status=502), "failed: status 502"),
])
def test_every_way_of_mixing_is_found(change: Any, fault: str) -> None:
    assert any(found.startswith(fault) for found in faults_of(change(answer()), KNOWN))
