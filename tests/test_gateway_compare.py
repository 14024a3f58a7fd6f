"""What the canary is told, and what it does when the disk is full: the proxy in front of engines that are functions."""

import asyncio
import contextlib
import heapq
import json
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from vocabext.cli.main import cli
from vocabext.errors import CheckpointError
from vocabext.serve.gateway import app, relay, trial
from vocabext.serve.gateway.admin import TOKEN_HEADER, admin_application, ordered
from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.app import Gateway, Proxy
from vocabext.serve.gateway.arms import ARMS, Arm
from vocabext.serve.gateway.calls import Request
from vocabext.serve.gateway.canary import FAILURES, FIRST, LENGTH, PACE, Canary
from vocabext.serve.gateway.engines import Engines
from vocabext.serve.gateway.guard import Limits
from vocabext.serve.gateway.load import Loads
from vocabext.serve.gateway.metrics import Metrics
from vocabext.serve.gateway.observe import Observation
from vocabext.serve.gateway.policy import Policy
from vocabext.serve.gateway.record import Recorder
from vocabext.serve.gateway.side_tasks import SideTasks
from vocabext.serve.gateway.state import State, read_state
from vocabext.serve.gateway.trial import Trial

Answer = Callable[[], Awaitable[tuple[int, list[bytes]]]]
TEXT = json.dumps({"choices": [{"text": "hello", "finish_reason": "stop"}]}).encode()
PINNED, USER = [(b"x-vocabext-arm", b"expanded")], [(b"x-vocabext-user", b"me")]


async def good() -> tuple[int, list[bytes]]:
    return 200, [TEXT]


def answering(status: int) -> Answer:
    async def answer() -> tuple[int, list[bytes]]:
        return status, [b"{}"]
    return answer


def after(seconds: float) -> Answer:
    async def answer() -> tuple[int, list[bytes]]:
        await asyncio.sleep(seconds)
        return await good()
    return answer


class Connections:
    """Both engines, in place of connections to them."""

    def __init__(self, arms: dict[str, Answer]) -> None:
        self.arms, self.asked = arms, []  # type: ignore[var-annotated]

    @contextlib.asynccontextmanager
    async def call(self, method: str, url: str, *, arm: str, **_: Any) -> AsyncIterator[Any]:
        self.asked.append(arm)
        status, parts = await self.arms[arm]()

        async def read() -> bytes:
            return b"".join(parts)
        yield SimpleNamespace(status=status, content_type="application/json", raw_headers=[], read=read)

    async def close(self) -> None:
        pass


class Rig:
    """A gateway without sockets."""

    def __init__(self, folder: Path, policy: Policy, *, front: Any = None, **arms: Answer) -> None:
        self.engines = Connections({"base": good, "expanded": good, **arms})
        self.notes: list[str] = []
        state = State(folder / "state.json", policy)
        state.save()
        urls = {name: "http://one" if front else f"http://{name}" for name in ARMS}
        arms = {name: Arm(name, urls[name], "m") for name in ARMS}
        metrics, side_tasks = Metrics(), SideTasks(self.notes.append)
        self.gateway = Gateway(
            Engines(arms, self.engines, front, "m"),  # type: ignore[arg-type]
            Trial(state, Canary(), metrics, side_tasks), Loads(metrics, Limits().in_flight), metrics, side_tasks)

    async def ask(self, headers: list[tuple[bytes, bytes]] | None = None, *, leave: float = 60.0, **body: Any
                  ) -> tuple[int, bytes]:
        """Send a request; returns what the client got, status 0 for nothing."""
        sent: list[Any] = []
        messages = iter([{"type": "http.request", "body": json.dumps({"prompt": "hi", **body}).encode()}])

        async def receive() -> Any:
            if message := next(messages, None):
                return message
            await asyncio.sleep(leave)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"path": "/v1/completions", "headers": [(b"content-type", b"application/json"), *(headers or [])]}
        await Proxy(self.gateway)(scope, receive, send)
        return (sent[0]["status"], b"".join(m["body"] for m in sent[1:])) if sent else (0, b"")

    async def settle(self) -> None:
        """Wait for the copies."""
        await asyncio.gather(*self.gateway.side_tasks.tasks)

    def seen(self, measure: str) -> dict[str, int]:
        """Return how many answers of each arm a measure knows."""
        assert self.gateway.trial.canary is not None
        return next(f["values"] for f in self.gateway.trial.canary.to_json()["findings"] if f["measure"] == measure)

    def failed(self) -> dict[str, float | None]:
        """Return the share of failures of each arm."""
        assert self.gateway.trial.canary is not None
        found = self.gateway.trial.canary.findings()[0]
        return {"base": found.base, "expanded": found.expanded}


@pytest.fixture(autouse=True)
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: Any) -> None:
        return None
    monkeypatch.setattr(app, "reading_loss", nothing)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


# --- who is compared


@pytest.mark.parametrize(("headers", "mirror", "base", "expanded", "asked"), [
    ([], 0, 1, 0, 1), ([], 100, 1, 1, 2), (USER, 0, 0, 0, 1), (USER, 100, 1, 1, 2), (PINNED, 0, 0, 0, 1),
    (PINNED, 100, 0, 0, 1)])
def test_only_what_chance_divided_or_both_arms_answered_is_compared(
    tmp_path: Path, headers: list[tuple[bytes, bytes]], mirror: float, base: int, expanded: int, asked: int
) -> None:
    async def work() -> None:
        rig = Rig(tmp_path, Policy(0, mirror))
        assert (await rig.ask(headers))[0] == 200
        await rig.settle()
        assert rig.seen(FAILURES) == rig.seen(LENGTH) == {"base": base, "expanded": expanded}
        assert len(rig.engines.asked) == asked
    run(work)


def test_pinned_requests_never_take_an_arm_back(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path, Policy(10), expanded=answering(500))
        for _ in range(150):
            assert (await rig.ask(PINNED))[0] == 500
        assert rig.gateway.trial.state.serial == 0
    run(work)


def test_pinned_requests_are_not_recorded(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path, Policy())
        rig.gateway.recorder = Recorder(tmp_path / "requests.jsonl", 9)
        await rig.ask(PINNED, prompt="pinned")
        await rig.ask(USER, prompt="a user's")
        rig.gateway.recorder.close()
        lines = (tmp_path / "requests.jsonl").read_text().splitlines()
        assert [json.loads(line)["body"]["prompt"] for line in lines] == ["a user's"]
    run(work)


# --- answers that did not come


def test_an_arm_that_hangs_until_clients_leave_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SILENT_SECONDS", 0.02)

    async def work() -> None:
        rig = Rig(tmp_path, Policy(50), expanded=after(60))
        for _ in range(20):
            await asyncio.gather(*(rig.ask(leave=0.03) for _ in range(20)))
            if rig.gateway.trial.state.serial:
                break
        assert rig.gateway.trial.state.policy.expanded_percent == 0
        assert "failures" in rig.gateway.trial.state.changes[-1]["reason"]
    run(work)


def test_clients_that_leave_without_having_waited_say_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path, Policy(100, 100), base=after(0.05), expanded=after(60))
        assert (await rig.ask(leave=0.02))[0] == 0
        await rig.settle()
        assert rig.engines.asked == ["expanded", "base"]
        assert rig.seen(FAILURES) == rig.seen(LENGTH) == {"base": 0, "expanded": 0}  # the copy does not count alone
    run(work)


@pytest.mark.parametrize(("seconds", "failed"), [(0.5, 1.0), (0.0, 0.0)])
def test_a_client_that_left_would_have_left_the_copy_too_unless_it_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, failed: float
) -> None:
    monkeypatch.setattr(app, "SILENT_SECONDS", 0.02)

    async def work() -> None:
        rig = Rig(tmp_path, Policy(100, 100), base=after(seconds), expanded=after(60))
        assert (await rig.ask(leave=0.04))[0] == 0
        await rig.settle()
        assert rig.failed() == {"base": failed, "expanded": 1.0}
    run(work)


@pytest.mark.parametrize("percent", [100, 50, 10])
def test_clients_that_leave_take_nothing_back_where_the_base_does_not_answer_them_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, percent: float
) -> None:
    monkeypatch.setattr(app, "SILENT_SECONDS", 0.02)

    async def work() -> None:
        rig = Rig(tmp_path, Policy(percent), base=after(60), expanded=after(60))
        await asyncio.gather(*(rig.ask(leave=0.03) for _ in range(200)))
        assert rig.gateway.trial.state.serial == 0
        assert sum(rig.seen(FAILURES).values()) == 200
    run(work)


def test_an_arm_that_was_seen_cannot_be_left_to_its_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SILENT_SECONDS", 0.02)
    sent: list[Any] = []

    async def part_and_silence() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.01)
        assert not sent, "the arm was told before the answer began"
        yield b'data: {"choices": [{"text": "a"}]}\n\n'
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        assert (b"x-vocabext-arm", b"expanded") in sent[0]["headers"]
        await asyncio.sleep(60)

    class Streams(Connections):
        @contextlib.asynccontextmanager
        async def call(self, method: str, url: str, **_: Any) -> AsyncIterator[Any]:
            yield SimpleNamespace(status=200, content_type="text/event-stream", raw_headers=[],
                                  content=SimpleNamespace(iter_any=part_and_silence))

    async def work() -> None:
        rig = Rig(tmp_path, Policy(100))
        rig.gateway.engines.upstream = Streams({})  # type: ignore[assignment]
        messages = iter([{"type": "http.request", "body": b'{"prompt": "hi", "stream": true}'}])

        async def receive() -> Any:
            if message := next(messages, None):
                return message
            await asyncio.sleep(0.1)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await Proxy(rig.gateway)({"path": "/v1/completions", "headers": []}, receive, send)
        assert rig.seen(FAILURES) == {"base": 0, "expanded": 0}
    run(work)
    assert len(sent) == 2


# --- requests that were refused


def test_an_arm_that_refuses_what_the_other_answers_is_taken_back(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path, Policy(50), expanded=answering(400))
        for _ in range(600):
            await rig.ask()
            if rig.gateway.trial.state.serial:
                break
        assert rig.gateway.trial.state.changes[-1]["by"] == "canary"
    run(work)


@pytest.mark.parametrize(("percent", "status"), [(50, 400), (100, 400), (50, 429)])
def test_mistakes_of_clients_take_nothing_back(tmp_path: Path, percent: float, status: int) -> None:
    async def work() -> None:
        rig = Rig(tmp_path, Policy(percent), base=answering(status), expanded=answering(status))
        for _ in range(400):
            await rig.ask()
        assert rig.gateway.trial.state.serial == 0
        assert (rig.seen(FAILURES)["expanded"] > 0) == (status == 400)
    run(work)


def test_one_engine_refuses_for_both_arms(tmp_path: Path) -> None:
    async def work() -> None:
        async def call(*_: Any) -> Any:
            raise Refusal(400, "the base arm of one engine cannot do this")
        rig = Rig(tmp_path, Policy(100, 100), front=SimpleNamespace(call=call), expanded=answering(400))
        await rig.ask()
        await rig.settle()
        assert rig.seen(FAILURES) == {"base": 0, "expanded": 0}
        rig.engines.arms["expanded"] = good
        await rig.ask()
        await rig.settle()
        assert rig.seen(FAILURES) == {"base": 0, "expanded": 1}  # the gateway's own refusal is nobody's failure
    run(work)


# --- a disk that is full


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no state be written."""
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(State, "_write", write)


def test_the_canary_takes_back_without_a_disk_and_saves_it_later(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path, Policy(100), expanded=answering(500))
        with pytest.MonkeyPatch.context() as patch:
            full(patch)
            patch.setattr(trial, "SAVE_AGAIN_SECONDS", 0.01)
            arms = []
            for _ in range(200):
                status, _ = await rig.ask()
                arms.append(rig.engines.asked[-1])
                assert status == (500 if arms[-1] == "expanded" else 200)
            assert arms[-1] == "base"
            assert rig.gateway.trial.state.unsaved.endswith("state.json cannot be written (No space left on device)")
            await asyncio.sleep(0.05)
            assert read_state(tmp_path / "state.json").policy.expanded_percent == 100
            assert len(rig.notes) == 1
            assert "a restart would not know of it" in rig.notes[0]
        await rig.settle()
        assert rig.gateway.trial.state.unsaved == ""
        assert read_state(tmp_path / "state.json").policy.expanded_percent == 0
        assert len(rig.notes) == 2
    run(work)


def test_an_operators_rollback_succeeds_without_a_disk_and_a_swap_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, Policy(50))
    full(monkeypatch)
    headers = {TOKEN_HEADER: rig.gateway.trial.state.token}
    with TestClient(admin_application(rig.gateway.trial, rig.gateway.status)) as client:
        answer = client.post("/swap", json={"to": "expanded"}, headers=headers)
        assert (answer.status_code, rig.gateway.trial.state.policy.expanded_percent) == (500, 50)
        answer = client.post("/swap", json={"rollback": True, "reason": "now"}, headers=headers)
        assert (answer.status_code, rig.gateway.trial.state.policy.expanded_percent) == (200, 0)
        assert "cannot be written (No space left on device)" in answer.json()["unsaved"]
        assert answer.json()["changes"][-1]["reason"] == "now"
    monkeypatch.undo()
    monkeypatch.setattr("vocabext.serve.gateway.admin.send_order", lambda *_: {**answer.json(), "canary": None})
    done = CliRunner().invoke(cli, ["serve", "swap", "--rollback", "--state", str(tmp_path / "state.json")])
    assert done.exit_code == 0
    assert "a restart would not know of it" in done.output


def test_a_swap_to_a_folder_that_was_changed_is_refused_and_a_rollback_is_not(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Policy(50))
    trial, asked = rig.gateway.trial, []

    def check() -> None:
        asked.append(trial.policy.expanded_percent)
        if len(asked) == 2:
            trial.roll_back(by="the canary")
            return
        raise CheckpointError("config.json has 3 bytes; 900 were verified")

    headers = {TOKEN_HEADER: trial.state.token}
    with TestClient(admin_application(trial, rig.gateway.status, check)) as client:
        def swap(**order: Any) -> tuple[int, str]:
            answer = client.post("/swap", json=order, headers=headers)
            return answer.status_code, answer.text

        status, text = swap(to="expanded")
        assert (status, trial.policy.expanded_percent) == (409, 50)
        assert "config.json has 3 bytes; 900 were verified" in text
        status, text = swap(to="expanded")  # and a rollback comes while the folder is looked at
        assert (status, trial.policy.expanded_percent) == (409, 0)
        assert "the policy changed while the folders were checked; swap again" in text
        assert swap(to="base")[0] == swap(rollback=True)[0] == 200
    assert asked == [50, 50]


def test_a_full_disk_ends_the_record_and_no_request(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path, Policy())
        rig.gateway.recorder = Recorder(Path("/dev/full"), 9)
        for _ in range(3):
            assert (await rig.ask())[0] == 200
        rig.gateway.recorder.close()
        assert rig.notes == ["no more requests are recorded: /dev/full cannot be written (No space left on device)"]
    run(work)


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    recorder = Recorder(path, 9)
    request = Request("/v1/completions", [], b"", {"prompt": "hi"}, 0.0)
    assert recorder.write(request) == ""
    whole, file = path.read_bytes(), recorder._file
    recorder._file = SimpleNamespace(  # type: ignore[assignment]
        write=lambda line: file.write(line[:7]), fileno=file.fileno, truncate=file.truncate, close=file.close)
    assert "cannot be written" in recorder.write(request)
    assert recorder.write(request) == ""
    assert path.read_bytes() == whole
    recorder.close()


# --- faults of the gateway's own


def test_a_fault_of_the_gateway_is_answered_in_json_and_logged_without_the_request(tmp_path: Path) -> None:
    async def work() -> None:
        async def broken() -> tuple[int, list[bytes]]:
            raise RuntimeError("my secret")
        rig = Rig(tmp_path, Policy(), base=broken)
        status, body = await rig.ask(prompt="my secret")
        assert (status, json.loads(body)["error"]["code"]) == (500, 500)
        assert "RuntimeError at app.py:" in rig.notes[0]
        assert "secret" not in rig.notes[0] + body.decode()
        rig.gateway.side_tasks.spawn(broken())  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert "RuntimeError" in rig.notes[1]
        assert "secret" not in rig.notes[1]
    run(work)


def test_a_fault_in_a_stream_ends_it_with_an_error() -> None:
    async def work() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)
        outbox = relay.Outbox(send)
        headers = [(b"content-type", b"text/event-stream")]
        await outbox({"type": "http.response.start", "status": 200, "headers": headers})
        await outbox.fail(500, "broken", [])
        assert json.loads(sent[-1]["body"].strip().removeprefix(b"data: "))["error"]["message"] == "broken"
        assert not sent[-1]["more_body"]
    run(work)


# --- loads


def test_a_new_share_mirrors_nothing_unless_it_says_so() -> None:
    policy = Policy(0, 20, "s")
    assert ordered(policy, {"to": "expanded", "percent": 30}) == Policy(30, 0, "s")
    assert ordered(policy, {"to": "expanded", "percent": 30, "mirror_percent": 5}) == Policy(30, 5, "s")
    assert ordered(Policy(30, 0, "s"), {"mirror_percent": 5}) == Policy(30, 5, "s")
    assert ordered(policy, {"reason": "none"}) == policy


@pytest.mark.parametrize(("base", "expanded", "alike"), [(0, 0, True), (1, 1, True), (0, 1, True), (4, 6, True),
                                                         (4, 7, False), (7, 4, False), (0, 2, False), (2, 0, False)])
def test_loads_are_alike_within_a_factor_or_hardly_there(base: int, expanded: int, alike: bool) -> None:
    loads, beside = Loads(Metrics(), 256), {"base": base, "expanded": expanded}
    for arm in ARMS:
        for _ in range(beside[arm]):
            loads.begin(arm)
    for arm in ARMS:
        loads.begin(arm)
        since = loads.mark()
        time.sleep(0.001)
        assert loads.alike(arm, since) == alike
        loads.end(arm)


def test_a_load_is_that_of_the_whole_answer() -> None:
    now = 0.0
    loads = Loads(Metrics(), 256, clock=lambda: now)
    loads.begin("expanded")
    since = loads.mark()
    now = 0.1
    for _ in range(30):
        loads.begin("expanded")
    assert loads.alike("expanded", since)
    now = 1.0
    assert not loads.alike("expanded", since)


def test_one_engine_bears_one_load(tmp_path: Path) -> None:
    for front in (None, SimpleNamespace()):
        rig = Rig(tmp_path, Policy(50), front=front)
        since = rig.gateway.loads.mark()
        for _ in range(9):
            rig.gateway.loads.begin("expanded")
        time.sleep(0.001)
        assert rig.gateway.measured(Observation("expanded", False, 1.0, counted=True), since).alike == bool(front)


def under_load(seed: int, share: float, *, clients: int = 32, slower: float = 1.0, blind: bool = False,
               requests: int = 1500) -> tuple[int | None, str]:
    """Let clients ask engines that share their time out among their requests; when did the canary stop, and why?

    Both engines are slower the more requests are in flight: twice as slow at 9 as at 1, five times at 33.
    """
    chance, canary, now = random.Random(seed), Canary(), 0.0
    loads = Loads(Metrics(), 256, clock=lambda: now)
    done = dict.fromkeys(ARMS, 0.0)  # characters that each request has had from an engine
    queues: dict[str, list[tuple[float, float, int, float, float, Any]]] = {arm: [] for arm in ARMS}

    def cost(arm: str) -> float:
        return (1 + len(queues[arm]) / 8) * (slower if arm == "expanded" else 1.0)

    def send() -> None:
        arm = "expanded" if chance.random() < share else "base"
        loads.begin(arm)
        characters = 1 + int(math.exp(chance.gauss(5.5, 0.8)))
        first = 0.05 * math.exp(chance.gauss(0, 0.6)) * cost(arm)
        heapq.heappush(queues[arm], (done[arm] + characters, chance.random(), characters, now, first, loads.mark()))

    for _ in range(clients):
        send()
    for number in range(requests):
        ends = {arm: (queue[0][0] - done[arm]) * 0.003 * cost(arm) for arm, queue in queues.items() if queue}
        arm = min(ends, key=ends.__getitem__)
        for name, queue in queues.items():
            done[name] += ends[arm] / 0.003 / cost(name) if queue else 0.0
        now += ends[arm]
        _, _, characters, began, first, since = heapq.heappop(queues[arm])
        canary.add(Observation(arm, False, now - began, first, characters, "x", "stop", True,
                               alike=blind or loads.alike(arm, since)))
        loads.end(arm)
        if reason := canary.reason_to_stop():
            return number, reason
        send()
    return None, ""


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6, 0.9])
def test_identical_arms_under_unequal_loads_are_not_taken_back(share: float) -> None:
    assert [under_load(seed, share)[0] for seed in range(5)] == [None] * 5


def test_the_same_loads_would_take_them_back_if_nobody_looked_at_them() -> None:
    for seed in range(3):
        assert PACE in under_load(seed, 0.9, blind=True)[1]


@pytest.mark.parametrize(("share", "clients"), [(0.1, 2), (0.33, 32), (0.5, 8)])
def test_a_slower_arm_is_found_where_loads_are_alike(share: float, clients: int) -> None:
    for seed in range(3):
        assert PACE in under_load(seed, share, clients=clients, slower=2.0)[1]


def test_times_under_other_loads_are_reported_and_not_judged() -> None:
    canary = Canary()
    for arm, seconds in (("base", 1.0), ("expanded", 9.0)):
        for _ in range(100):
            canary.add(Observation(arm, False, seconds, seconds, 10, "x", "stop", True, alike=False))
    assert canary.reason_to_stop() == ""
    found = canary.to_json()
    assert found["under_any_load"][PACE] == {"base": pytest.approx(0.1), "expanded": pytest.approx(0.9)}
    assert found["under_any_load"][FIRST]["expanded"] == pytest.approx(9.0)
