"""Confidence sequences and the canary: it fires on what it should, and on nothing else."""

import asyncio
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gateway_rig import fake_engine, gateway

from vocabext.errors import UsageError
from vocabext.serve.gateway.arms import Arm
from vocabext.serve.gateway.calls import Request
from vocabext.serve.gateway.canary import Bounds, Canary, agreement
from vocabext.serve.gateway.engines import Engines
from vocabext.serve.gateway.load import Loads
from vocabext.serve.gateway.metrics import Metrics
from vocabext.serve.gateway.observe import Observation, observe
from vocabext.serve.gateway.reading import reading_loss
from vocabext.serve.gateway.sequential import BURN_IN, BoundedMean, Mean
from vocabext.tokens import Expansion, NewToken


def trial(seed: int, *, pace: float = 1.0, failing: float = 0.0, first: float = 1.0, length: float = 1.0,
          agreeing: float | None = None, drift: bool = False, requests: int = 2500) -> tuple[int | None, str]:
    """Send requests past a canary, a third of them to the expanded arm; when did it stop, and why?"""
    chance, canary, load = random.Random(seed), Canary(), 0.0
    for number in range(requests):
        worse = chance.random() < 0.33
        arm = "expanded" if worse else "base"
        load = 0.98 * load + chance.gauss(0, 0.05) if drift else 0.0
        if chance.random() < 0.005 + (failing if worse else 0.0):
            canary.add(Observation(arm, True, 1.0))
        else:
            characters = 1 + int(math.exp(chance.gauss(5.5, 0.8)) * (length if worse else 1.0))
            seconds = characters * 0.003 * math.exp(chance.gauss(0, 0.3) + load) * (pace if worse else 1.0)
            to_first = 0.05 * math.exp(chance.gauss(0, 0.6) + load) * (first if worse else 1.0)
            canary.add(Observation(arm, False, seconds, to_first, characters, "x", "stop", True))
        if agreeing is not None and worse:
            text = "abcd" if chance.random() < agreeing else "zbcd"
            canary.compare(Observation("base", False, 1.0, text="abcd", counted=True),
                           Observation("expanded", False, 1.0, text=text, counted=True))
        if reason := canary.reason_to_stop():
            return number, reason
    return None, ""


@pytest.mark.slow
def test_identical_arms_are_not_rolled_back_in_20_of_20_runs() -> None:
    assert [trial(seed, agreeing=1.0, drift=seed % 2 == 1, requests=1000)[0] for seed in range(20)] == [None] * 20


@pytest.mark.parametrize(("fault", "measure"), [
    ({"failing": 1.0}, "failures"), ({"failing": 0.3}, "failures"), ({"pace": 2.0}, "seconds per character"),
    ({"first": 3.0}, "seconds to the first character"), ({"length": 0.2}, "characters per answer"),
    ({"length": 5.0}, "characters per answer"), ({"agreeing": 0.0}, "agreement"),
])
def test_an_arm_that_is_worse_beyond_its_bound_is_found_and_the_reason_named(
    fault: dict[str, float], measure: str
) -> None:
    number, reason = trial(1, **fault)  # type: ignore[arg-type]
    assert number is not None
    assert reason.startswith(f"{measure}: ")
    assert "the bound is" in reason


@pytest.mark.parametrize("fault", [{"pace": 1.1}, {"failing": 0.005}, {"first": 1.2}, {"agreeing": 0.5}])
def test_an_arm_that_is_worse_within_its_bound_stays(fault: dict[str, float]) -> None:
    assert trial(2, **fault) == (None, "")  # type: ignore[arg-type]


def test_the_limits_hold_the_truth_at_all_times() -> None:
    """At level 0.05, at most a few of 100 sequences may ever exclude the truth."""
    for truth, bounded in ((0.05, True), (0.5, True), (3.0, False)):
        excluded = 0
        for seed in range(100):
            chance, known = random.Random(seed), BoundedMean(0.05) if bounded else Mean()
            for _ in range(400):
                known.add(float(chance.random() < truth) if bounded else chance.gauss(truth, 2.0))
                low, high = known.limits(0.05)
                if not low <= truth <= high:
                    excluded += 1
                    break
        assert excluded <= 8, (truth, excluded)


def test_the_limits_close_in() -> None:
    known, mean = BoundedMean(0.05), Mean()
    for number in range(2000):
        known.add(float(number % 10 == 0))
        mean.add(float(number % 10))
        if number < BURN_IN - 1:
            assert mean.limits(0.05) == (-math.inf, math.inf)
    low, high = known.limits(0.05)
    assert 0.05 < low < 0.1 < high < 0.15
    low, high = mean.limits(0.05)
    assert 4.2 < low < 4.5 < high < 4.8


def test_a_trial_begins_anew_with_every_change() -> None:
    canary = Canary()
    for _ in range(100):
        canary.add(Observation("expanded", True, 1.0))
    assert "failures" in canary.reason_to_stop()
    canary.restart()
    assert canary.reason_to_stop() == ""


def test_a_refused_request_says_nothing_about_an_arm() -> None:
    canary = Canary()
    for _ in range(100):
        canary.add(Observation("expanded", False, 1.0))
    assert canary.to_json()["findings"][0]["values"] == {"base": 0, "expanded": 0}


@pytest.mark.parametrize(("one", "another", "share"), [
    ("", "", 1.0), ("abc", "abc", 1.0), ("abcd", "abxd", 0.5), ("ab", "abcd", 0.5), ("x", "", 0.0)])
def test_agreement_is_the_common_beginning(one: str, another: str, share: float) -> None:
    assert agreement(one, another) == share


def test_bounds_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the pace ratio is 0\.5; it must be from 1"):
        Bounds(pace_ratio=0.5)


def test_answers_are_read_after_they_were_passed_on() -> None:
    stream = (b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n',
              b'data: {"choices": [{"index": 0, "delta": {"content": "h\xc3', b'\xa9"}}]}\n\n',
              b'data: {"choices": [{"index": 0, "delta": {"content": "!"}, "finish_reason": "stop"}]}\n\n'
              b'data: [DONE]\n\n')
    seen = observe("base", 200, list(enumerate(stream)), 9.0, streamed=True)
    assert (seen.text, seen.characters, seen.first_text_seconds, seen.finish_reason) == ("hé!", 3, 2, "stop")
    assert observe("base", 200, list(enumerate(stream[:-1])), 9.0, streamed=True).failed
    assert observe("base", 200, [(0, b"<html>")], 9.0, streamed=False).failed
    assert not observe("base", 404, [(0, b"{}")], 9.0, streamed=False).failed
    assert observe("base", 503, [(0, b"{}")], 9.0, streamed=False).failed


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "temperature", "reason"), [
    ("differ, number ", 0.0, "agree with the base's over"), ("the same, number ", 0.0, ""),
    ("misread, number ", 1.0, "less likely by 1.000 nats per character in 30 pairs"), ("well read, number ", 1.0, "")])
def test_a_running_gateway_takes_back_an_arm_that_reads_or_answers_otherwise(
    tmp_path: Path, prompt: str, temperature: float, reason: str
) -> None:
    with (fake_engine(tmp_path, "base", "--delay", "0") as base,
          fake_engine(tmp_path, "expanded", "--delay", "0") as expanded,
          gateway(tmp_path, base.url, expanded.url, "--model-name", "m", "--min-agreement", "0.5") as running,
          running.client() as client):
        running.order(to="expanded", percent=20, mirror_percent=100)
        for number in range(120):
            answer = client.post("/v1/completions", json={"model": "m", "prompt": f"{prompt}{number}",
                                                          "temperature": temperature})
            assert answer.status_code == 200
            if running.state.read_text().count('"canary"'):
                break
        changes = running.status()["changes"]
        assert (changes[-1]["by"] == "canary") == (number < 119) == bool(reason)
        if reason:
            assert reason in changes[-1]["reason"]
            assert (changes[-1]["policy"]["expanded_percent"], changes[-1]["policy"]["mirror_percent"]) == (0, 0)
            answer = client.post("/v1/completions", json={"model": "m", "prompt": "x"})
            assert answer.headers["x-vocabext-arm"] == "base"


class Connections:
    """Both engines, in place of connections to them: a merged `ab` is id 200; what they were asked."""

    def __init__(self, *, lost: float) -> None:
        self.lost = lost
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []

    async def post_json(self, url: str, value: bytes, *, arm: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        document = json.loads(value)
        self.asked.append((arm, url.rpartition("/")[2]))
        self.bodies.append(document)
        if url.endswith("/tokenize"):
            text = document["prompt"] if "prompt" in document else document["messages"][-1]["content"]
            text = text.replace("ab", "\u00c8") if arm == "expanded" else text
            return 200, json.dumps({"tokens": [ord(c) for c in text]}).encode()
        # All rows: the new ones take half a nat from every base id, whatever the prompt.
        found = (-1.5 if arm == "expanded" else -1.0) - self.lost * (200 in document["prompt"])
        steps = [None, *({str(i): {"logprob": found}} for i in document["prompt"][1:])]
        return 200, json.dumps({"choices": [{"prompt_logprobs": steps}]}).encode()


def read(engines: Connections, prompt: str, *, one_engine: bool = False, busy: int = 0, **chat: Any) -> float | None:
    """Let the expanded engine read a prompt and the base's answer `hello`."""
    front = SimpleNamespace(encode=lambda text, special: [ord(c) for c in text],
                            expansion=Expansion([NewToken("ab", "ab", (97, 98))], 200))
    arms = {"base": Arm("base", "http://base", "b"), "expanded": Arm("expanded", "http://expanded", "e")}
    found = Engines(arms, engines, front if one_engine else None)  # type: ignore[arg-type]
    loads = Loads(Metrics(), 2)
    loads.in_flight["expanded"] = busy
    document = {"messages": [{"role": "user", "content": prompt}], **chat} if chat else {"prompt": prompt}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    loss = asyncio.run(reading_loss(found, loads, Request(path, [], b"", document, 0.0), "hello"))
    assert loads.in_flight["expanded"] == busy
    return loss


@pytest.mark.parametrize("one_engine", [False, True])
@pytest.mark.parametrize("lost", [0.0, 0.25])
def test_what_new_tokens_take_from_base_ids_is_not_taken_for_bad_reading(one_engine: bool, lost: float) -> None:
    engines = Connections(lost=lost)
    assert read(engines, "ab c", one_engine=one_engine) == pytest.approx(lost)
    assert [what for what in engines.asked if what[1] == "completions"] == [("expanded", "completions")] * 2
    assert (("base", "tokenize") in engines.asked) == (not one_engine)


@pytest.mark.parametrize(("prompt", "busy", "loss"), [("c", 0, 0.0), ("ab" + "c" * 2_050, 0, None), ("ab", 2, None)])
def test_what_need_not_or_must_not_be_read_costs_no_pass(prompt: str, busy: int, loss: float | None) -> None:
    engines = Connections(lost=1.0)
    assert read(engines, prompt, busy=busy) == loss
    assert "completions" not in {path for _, path in engines.asked}


def test_a_chat_is_read_as_the_chat_endpoint_renders_it() -> None:
    engines = Connections(lost=0.25)
    assert read(engines, "ab c", model="theirs", reasoning_effort="low") == pytest.approx(0.25)
    rendered = [body for body in engines.bodies if "messages" in body]
    assert [body["model"] for body in rendered] == ["e", "b"]
    assert all(body["chat_template_kwargs"]["reasoning_effort"] == "low" for body in rendered)
