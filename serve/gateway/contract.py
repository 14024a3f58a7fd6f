"""What clients of an OpenAI-compatible server rely on, item by item.

Each item gets a verdict:

    pass          both arms keep it
    differs       both keep it, and the numbers differ by nature; says how
    FAIL          the expanded arm breaks what the base arm keeps; the base arm's own faults are none
    not checked   the base arm does not do it either, or it needs something that is not there; says what

Every case is tried on the base arm first, and on the expanded arm only where the base arm keeps it: what the base
breaks or refuses is not checked, with the reason.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from vocabext.serve.gateway.arms import ARMS, BASE, EXPANDED
from vocabext.serve.gateway.canary import agreement
from vocabext.serve.gateway.observe import events_of
from vocabext.serve.gateway.replay import Rehearsal, Reply

PASS, DIFFERS, FAIL, NOT_CHECKED = "pass", "differs", "FAIL", "not checked"
FORCE = 100.0  # as a bias: whatever else the model would write
TRIED_TOKENS = 5
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
          "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "note", "description": "Take a note.", "parameters": SCHEMA}}
OTHER_TEXT = "its parts add up to"


@dataclass(frozen=True)
class Item:
    """The verdict on one part of the contract.

    Attributes:
        name: What clients rely on.
        verdict: `pass`, `differs`, `FAIL` or `not checked`.
        detail: What was found, with numbers, and what it means for clients.
        checked: How many requests or tokens were tried.
        examples: What went wrong, at most three.
    """

    name: str
    verdict: str
    detail: str
    checked: int = 0
    examples: tuple[str, ...] = ()


class Cases:
    """What was tried for one item."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.tried = 0
        self.wrong: list[str] = []
        self.unchecked: list[str] = []

    def check(self, case: str, fault_of: Callable[[str], str]) -> bool:
        """Try a case on the base arm, and then on the expanded one.

        Args:
            case: What is tried, for messages.
            fault_of: Tries it on an arm; returns what is wrong, empty if nothing is.

        Returns:
            Whether both arms keep it.
        """
        if fault := _fault(fault_of, BASE):
            self.unchecked.append(f"{case}: {fault}")
            return False
        self.tried += 1
        if fault := _fault(fault_of, EXPANDED):
            self.wrong.append(f"{case}: {fault}")
        return not fault

    def item(self, name: str, detail: str, verdict: str = PASS, *, none: str = "") -> Item:
        """Return the verdict.

        Args:
            name: What clients rely on.
            detail: What was found if both arms keep it.
            verdict: What to say then.
            none: What to say if there was no case.
        """
        left = ""
        if self.unchecked:
            left = f"{len(self.unchecked)} not checked, the base arm does not do it either ({self.unchecked[0]})"
        if self.wrong:
            return Item(name, FAIL, "; ".join(filter(None, (f"{len(self.wrong)} of {self.tried} went wrong", left))),
                        self.tried, tuple(self.wrong[:3]))
        if not self.tried:
            return Item(name, NOT_CHECKED, left or none or "there is no request of this kind")
        return Item(name, verdict, "; ".join(filter(None, (detail, left))), self.tried)


def _fault(fault_of: Callable[[str], str], arm: str) -> str:
    try:
        return fault_of(arm)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return f"an answer could not be read ({type(error).__name__}: {error})"


def _refused(reply: Reply) -> str:
    return "" if reply.status == 200 else f"status {reply.status}: {reply.error}"


def _both_answer(r: Rehearsal, index: int) -> bool:
    """Tell whether both arms answer a request; if not, the first item says so."""
    return all(r.replay(arm, index).status == 200 for arm in ARMS)


def answers(r: Rehearsal) -> Item:
    """Every request that the base arm answers, the expanded arm answers."""
    cases, texts = Cases(), dict.fromkeys(ARMS, "")
    shares = []

    def fault_of(index: int, arm: str) -> str:
        reply = r.replay(arm, index)
        texts[arm] = reply.text if reply.status == 200 else ""
        return _refused(reply)

    for index in range(len(r.requests)):
        if cases.check(f"request {index + 1}", partial(fault_of, index)):
            shares.append(agreement(texts[BASE], texts[EXPANDED]))
    same, both = sum(share == 1 for share in shares), len(shares)
    return cases.item("every request is answered", f"{both} of {len(r.requests)} on both arms; {same} greedy answers "
                      f"are the same, on average the first {sum(shares) / max(1, both):.0%} of the text is. The text "
                      "of an answer is no contract; its quality is measured by `vocabext eval`",
                      PASS if same == both else DIFFERS)


def streams(r: Rehearsal) -> Item:
    """The parts of a stream are valid UTF-8, belong together, and add up to the answer that is not streamed."""
    cases = Cases()

    def fault_of(index: int, arm: str) -> str:
        fault = ""
        # The first of two answers found no prefix in the cache, the second did, and what is computed differently may
        # be rounded differently: only what also differs when both find it is a fault of the stream.
        for fresh in (False, True):
            whole = r.replay(arm, index, fresh=fresh)
            fault = stream_fault(r.replay(arm, index, fresh=fresh, stream=True, stream_options={
                "include_usage": True}), whole)
            if not fault.startswith(OTHER_TEXT):
                break
        return fault

    for index in range(len(r.requests)):
        if _both_answer(r, index) and not any(_calls(r.replay(arm, index)) for arm in ARMS):
            cases.check(f"request {index + 1}", partial(fault_of, index))
    return cases.item("streams add up", f"{cases.tried} streams on both arms")


def _calls(reply: Reply) -> list[Any]:
    """Return the tool calls of an answer."""
    choice = (reply.document.get("choices") or [{}])[0]
    return list((choice.get("message") or {}).get("tool_calls") or ())


def stream_fault(streamed: Reply, whole: Reply) -> str:
    """Return what is wrong with a stream, given the same answer as a whole."""
    if streamed.status != 200:
        return f"status {streamed.status}: {streamed.error}"
    texts: list[str] = []
    ids: set[Any] = set()
    usage: dict[str, Any] = {}
    try:
        events = [data.decode("utf-8") for _, data in events_of([(0.0, streamed.document["stream"])])]
        streamed.document["stream"].decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not valid UTF-8: {error}"
    if not events or events[-1] != "[DONE]":
        return "there is no [DONE] at its end"
    for data in events[:-1]:
        document = json.loads(data)
        ids.add(document.get("id"))
        usage = document.get("usage") or usage
        for choice in document.get("choices") or ():
            if choice.get("index", 0) == 0:
                texts.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
    if len(ids) != 1:
        return f"its parts have {len(ids)} different ids"
    if (text := "".join(texts)) != whole.text:
        return f"{OTHER_TEXT} {text[:80]!r}, the whole is {whole.text[:80]!r}"
    if usage.get("completion_tokens") != whole.usage.get("completion_tokens"):
        return f"it counts {usage.get('completion_tokens')} tokens, the whole {whole.usage.get('completion_tokens')}"
    return ""


def stop_strings(r: Rehearsal) -> Item:
    """A stop string that sits inside a new token stops the answer before it."""
    cases, tokens, prompt = Cases(), _long_tokens(r), r.prompts()[0]
    base_fault = _fault(lambda arm: _does_not_stop(r, arm, prompt), BASE) if tokens else ""

    def forced(token: Any, arm: str) -> str:
        if arm == BASE:  # it has no such token: what can be asked of it is that it stops at all
            return base_fault
        inside = _inside(token)
        expected = token.token[: token.token.index(inside)]
        reply = r.complete(arm, prompt, logit_bias={str(token.token_id): FORCE}, max_tokens=4, stop=[inside])
        if fault := _refused(reply):
            return fault
        if inside in reply.text or reply.choice.get("finish_reason") != "stop":
            return f"the answer goes on: text {reply.text!r}"
        return "" if reply.text.strip() == expected.strip() else f"text {reply.text!r}, expected {expected!r}"

    def recorded(index: int, stops: list[str], arm: str) -> str:
        return "the answer contains a stop string" if any(s in r.replay(arm, index).text for s in stops) else ""

    for token in tokens:
        cases.check(f"{_inside(token)!r} inside of {token.token!r}", partial(forced, token))
    for index, (_, body) in enumerate(r.requests):
        stops = body.get("stop") or []
        if stops and _both_answer(r, index):
            cases.check(f"request {index + 1}", partial(recorded, index, [stops] if isinstance(stops, str) else stops))
    return cases.item("stop strings", f"{cases.tried} cases; new tokens were forced, and the answer stops inside of "
                      "them")


def _does_not_stop(r: Rehearsal, arm: str, prompt: str) -> str:
    """Return why an arm cannot be expected to stop at a string; empty if it does."""
    written = r.complete(arm, prompt, max_tokens=8, ignore_eos=True)
    if written.status != 200:
        return _refused(written)
    inside = written.text.strip()[1:3]
    if len(inside) < 2 or not inside.isalnum():
        return ""  # nothing to stop in, and nothing to say against it
    stopped = r.complete(arm, prompt, max_tokens=8, ignore_eos=True, stop=[inside])
    if stopped.status != 200:
        return _refused(stopped)
    return f"it does not stop at {inside!r}: text {stopped.text!r}" if inside in stopped.text else ""


def max_tokens(r: Rehearsal) -> Item:
    """`max_tokens` is kept; the same number is more text."""
    cases, characters = Cases(), dict.fromkeys(ARMS, 0)

    def fault_of(arm: str) -> str:
        reply = r.complete(arm, r.prompts()[0], max_tokens=7, ignore_eos=True)
        if fault := _refused(reply):
            return fault
        characters[arm] = len(reply.text)
        count, reason = reply.usage.get("completion_tokens"), reply.choice.get("finish_reason")
        return "" if (count, reason) == (7, "length") else f"{count} tokens, finish_reason {reason}"

    cases.check("7 tokens", fault_of)
    longest = max(r.manifest.tokens, key=lambda token: len(token.run))
    return cases.item("max_tokens", f"the number of tokens is kept on both arms ({characters[BASE]} and "
                      f"{characters[EXPANDED]} characters for 7 tokens here). A new token counts as one and stands for "
                      f"up to {len(longest.run)} base tokens ({longest.token!r}), so the same limit lets answers be "
                      "longer", DIFFERS)


def logprobs(r: Rehearsal) -> Item:
    """Log-probabilities belong to the tokens of the text, one for each."""
    cases, new = Cases(), {token.token for token in r.manifest.tokens}
    leaked: list[str] = []

    def fault_of(arm: str) -> str:
        reply = r.complete(arm, r.prompts()[0], logprobs=2, max_tokens=6)
        if fault := _refused(reply):
            return fault
        found, counted = reply.choice["logprobs"], reply.usage["completion_tokens"]
        if arm == BASE:
            leaked.extend(token for row in found["top_logprobs"] for token in row or () if token in new)
        tokens, numbers = len(found["tokens"]), len(found["token_logprobs"])
        return "" if tokens == numbers == counted else f"{tokens} tokens, {numbers} numbers, {counted} counted"

    cases.check("6 tokens", fault_of)
    if leaked:  # the base has no such token: the expanded engine answers for it, and does not keep that to itself
        cases.wrong.append(f"base arm: the new token {leaked[0]!r} is among the alternatives")
    return cases.item("logprobs", "one for each token on both arms. Per token they do not compare between the arms (a "
                      "new token's is that of a longer text), and on the base arm of one engine the new tokens are "
                      "left out: there can be fewer alternatives", DIFFERS)


def echo(r: Rehearsal) -> Item:
    """`echo` gives the prompt back before the answer."""
    cases = Cases()

    def fault_of(prompt: str, arm: str) -> str:
        reply = r.complete(arm, prompt, echo=True, max_tokens=2)
        if fault := _refused(reply):
            return fault
        return "" if reply.text.strip().startswith(prompt.strip()) else f"came back as {reply.text[:60]!r}"

    for prompt in r.prompts()[:10]:
        cases.check(repr(prompt[:60]), partial(fault_of, prompt))
    return cases.item("echo", f"{cases.tried} prompts came back")


def logit_bias(r: Rehearsal) -> Item:
    """A bias by base ids works on the same tokens as before."""
    cases, prompt, texts = Cases(), r.prompts()[0], dict.fromkeys(ARMS, "")

    def fault_of(forced: int, arm: str) -> str:
        one, two = (r.complete(arm, prompt, logit_bias={str(forced): FORCE}, max_tokens=3, ignore_eos=True)
                    for _ in range(2))
        if fault := _refused(one) or _refused(two):
            return fault
        if (one.text, one.usage.get("completion_tokens")) != (two.text, 3):
            return f"{one.text!r}, then {two.text!r}, of {one.usage.get('completion_tokens')} tokens"
        texts[arm] = one.text
        same = arm == BASE or texts[BASE] == texts[EXPANDED]
        return "" if same else f"{texts[BASE]!r} on the base arm, {texts[EXPANDED]!r} on the expanded one"

    for token in _long_tokens(r):
        cases.check(f"id {token.run[-1]} forced", partial(fault_of, token.run[-1]))
    return cases.item("logit_bias by base ids", f"{cases.tried} base ids forced, with the same text on both arms. A "
                      "bias against a base id does not reach a new token that contains it: clients who ban words by "
                      "ids must ban the new token's id as well (vocabext.json lists the runs)", DIFFERS)


def several(r: Rehearsal) -> Item:
    """`n` answers come under the numbers 0 to n - 1."""
    cases = Cases()

    def fault_of(arm: str) -> str:
        reply = r.complete(arm, r.prompts()[0], n=3, temperature=1.0, max_tokens=4)
        if fault := _refused(reply):
            return fault
        indices = sorted(choice["index"] for choice in reply.document["choices"])
        return "" if indices == [0, 1, 2] else f"choices {indices}"

    cases.check("three answers", fault_of)
    return cases.item("n > 1", "three answers on both arms")


def prompt_ids(r: Rehearsal) -> Item:
    """A prompt of base ids is read as it is."""
    cases, same = Cases(), 0
    ids: list[int] = []
    texts = dict.fromkeys(ARMS, "")

    def fault_of(prompt: str, arm: str) -> str:
        if arm == BASE:
            tokens = r.ask(arm, "/tokenize", prompt=prompt)
            if tokens.status != 200:
                return _refused(tokens)
            ids[:] = tokens.document["tokens"]
        reply = r.complete(arm, ids)
        if fault := _refused(reply):
            return fault
        texts[arm], count = reply.text, reply.usage["prompt_tokens"]
        return "" if count == len(ids) else f"{len(ids)} ids were counted as {count}"

    for prompt in r.prompts()[:10]:
        if cases.check(repr(prompt[:60]), partial(fault_of, prompt)):
            same += texts[BASE] == texts[EXPANDED]
    return cases.item("prompts given as ids", f"{cases.tried} prompts of base ids are read as they are on both arms, "
                      f"and {same} have the same greedy answer. They are not shortened: only text is")


def json_mode(r: Rehearsal) -> Item:
    """Structured output is valid."""
    cases = Cases()

    def fault_of(kind: dict[str, Any], arm: str) -> str:
        reply = r.ask(arm, "/v1/chat/completions", messages=[{"role": "user", "content": r.prompts()[0][:200]}],
                      response_format=kind, max_tokens=60, temperature=0)
        if fault := _refused(reply):
            return fault
        if reply.choice.get("finish_reason") != "stop":  # of the expanded arm, that is no fault
            return "no complete answer in 60 tokens" if arm == BASE else ""
        try:
            json.loads(reply.text)
        except ValueError:
            return f"{reply.text[:80]!r} is no JSON"
        return ""

    for kind in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "ok", "schema": SCHEMA}}):
        cases.check(str(kind["type"]), partial(fault_of, kind))
    return cases.item("JSON mode", f"{cases.tried} kinds; complete answers are valid JSON on both arms")


def tool_calls(r: Rehearsal) -> Item:
    """A tool that must be called is called with valid arguments."""
    cases = Cases()

    def fault_of(arm: str) -> str:
        reply = r.ask(arm, "/v1/chat/completions", messages=[{"role": "user", "content": "Take a note."}],
                      tools=[TOOL], tool_choice="required", max_tokens=100, temperature=0)
        if fault := _refused(reply):
            return fault
        try:
            json.loads(_calls(reply)[0]["function"]["arguments"])
        except (IndexError, ValueError):
            if arm == BASE or reply.choice.get("finish_reason") != "length":
                return f"no valid call in {json.dumps(reply.choice)[:200]}"
        return ""

    cases.check("a call", fault_of)
    return cases.item("tool calls", "called with valid arguments on both arms")


def usage(r: Rehearsal) -> Item:
    """The numbers of tokens add up, and the expanded arm never counts more for a prompt."""
    cases, totals = Cases(), dict.fromkeys(ARMS, 0)

    def fault_of(index: int, arm: str) -> str:
        found, base = r.replay(arm, index).usage, r.replay(BASE, index).usage
        if found["total_tokens"] != found["prompt_tokens"] + found["completion_tokens"]:
            return str(found)
        more = found["prompt_tokens"] > base["prompt_tokens"]
        return (f"{base['prompt_tokens']} prompt tokens on the base arm, {found['prompt_tokens']} on the expanded one"
                if more else "")

    for index in range(len(r.requests)):
        if _both_answer(r, index) and cases.check(f"request {index + 1}", partial(fault_of, index)):
            for arm in ARMS:
                totals[arm] += r.replay(arm, index).usage["prompt_tokens"]
    share = 1 - totals[EXPANDED] / totals[BASE] if totals[BASE] else 0.0
    return cases.item("usage", f"prompts count {totals[BASE]} tokens on the base arm and {totals[EXPANDED]} on the "
                      f"expanded one ({share:.1%} fewer). Bills, quotas and rate limits by tokens change by that much",
                      DIFFERS)


def prefix_cache(r: Rehearsal) -> Item:
    """A prompt that is asked twice has one answer, and is not read twice."""
    cases, prompt = Cases(), (" ".join(r.prompts()) + " ")[:2000]
    cached: dict[str, int | None] = {}

    def fault_of(arm: str) -> str:
        limit = {"truncate_prompt_tokens": min(r.context - 20, 400)} if r.context else {}
        one, two = (r.complete(arm, prompt, **limit) for _ in range(2))
        if fault := _refused(one) or _refused(two):
            return fault
        cached[arm] = (two.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return "" if one.text == two.text else f"{one.text[:60]!r}, then {two.text[:60]!r}"

    cases.check("a prompt twice", fault_of)
    told = any(count is not None for count in cached.values())
    numbers = (f"{' and '.join(str(count or 0) for count in cached.values())} tokens came from the cache" if told else
               "the engine does not say how much came from the cache (--enable-prompt-tokens-details)")
    return cases.item("prefix cache", f"the same answer twice on both arms; {numbers}. The arms share no prefixes "
                      "where new tokens occur, so a swap begins with a cold cache", DIFFERS)


def long_prompts(r: Rehearsal) -> Item:
    """What fits into the context on the base arm fits on the expanded one."""
    name, cases = "prompts near the context limit", Cases()
    if not r.context:
        return Item(name, NOT_CHECKED, "the server does not say how long its context is")
    text = " ".join(r.prompts())
    fitting = _text_of_length(r, text, r.context - 4)
    if fitting is None:
        return Item(name, NOT_CHECKED, "no prompt near the limit could be made from the requests")
    prompt, count = fitting
    beyond: dict[str, int] = {}

    def fits(arm: str) -> str:
        return _refused(r.complete(arm, prompt, max_tokens=r.context - count))

    def refuses(arm: str) -> str:
        beyond[arm] = r.complete(arm, prompt + " " + text[:200], max_tokens=1).status
        if arm == BASE:
            return "" if beyond[arm] == 400 else f"status {beyond[arm]}"
        return "" if beyond[arm] in (200, 400) else f"status {beyond[arm]}, the base arm's is 400"

    if not cases.check(f"{count} base tokens", fits) and not cases.tried:
        return cases.item(name, "")
    cases.check("beyond the limit", refuses)
    said = {200: "the expanded arm takes a prompt that is too long for the base arm",
            400: "beyond the limit both arms refuse alike"}.get(beyond.get(EXPANDED, 0), "beyond it, nothing is known")
    return cases.item(name, f"a prompt of {count} of {r.context} base tokens is answered on both arms; {said}. The "
                      "context is counted in tokens: more text fits, and after a rollback it no longer does", DIFFERS)


def _text_of_length(r: Rehearsal, text: str, tokens: int) -> tuple[str, int] | None:
    """Return a text of nearly `tokens` base tokens, and their number."""
    whole = text
    while len(whole) < tokens * 12:
        whole += " " + text
    low, high, found = 0, len(whole) + 1, None
    while high - low > 1:  # down to a character: one may be several tokens
        middle = (low + high) // 2
        count = r.ask(BASE, "/tokenize", prompt=whole[:middle]).document.get("count")
        if not isinstance(count, int):
            return None
        if count <= tokens:
            low, found = middle, (whole[:middle], count)
        else:
            high = middle
    return found if found and found[1] > tokens - 12 else None


def _long_tokens(r: Rehearsal) -> list[Any]:
    """Return new tokens with enough characters to look into."""
    return [token for token in r.manifest.tokens if len(token.token.strip()) >= 4 and _inside(token).isalnum()
            and token.token.find(_inside(token)) >= 1][:TRIED_TOKENS]


def _inside(token: Any) -> str:
    """Return two characters from inside of a new token."""
    return str(token.token.strip()[1:3])


ITEMS: dict[str, Callable[[Rehearsal], Item]] = {
    "every request is answered": answers, "streams add up": streams, "stop strings": stop_strings,
    "max_tokens": max_tokens, "logprobs": logprobs, "echo": echo, "logit_bias by base ids": logit_bias,
    "n > 1": several, "prompts given as ids": prompt_ids, "JSON mode": json_mode, "tool calls": tool_calls,
    "usage": usage, "prefix cache": prefix_cache, "prompts near the context limit": long_prompts,
}
