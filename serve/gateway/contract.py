"""What clients of an OpenAI-compatible server rely on, item by item."""

import json
from collections.abc import Callable
from typing import Any

from serve.gateway.canary import agreement
from serve.gateway.observe import events_of
from serve.gateway.swap_test import (
    ARMS,
    BASE,
    DIFFERS,
    EXPANDED,
    FAIL,
    NOT_CHECKED,
    PASS,
    Item,
    Rehearsal,
    Reply,
)

FORCE = 100.0  # as a bias: whatever else the model would write
TRIED_TOKENS = 5
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
          "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "note", "description": "Take a note.", "parameters": SCHEMA}}


def answers(r: Rehearsal) -> Item:
    """Every request that the base arm answers, the expanded arm answers."""
    name, wrong, both, shares = "every request is answered", [], 0, []
    for index in range(len(r.requests)):
        base, expanded = (r.replay(arm, index) for arm in ARMS)
        if base.status == 200 and expanded.status != 200:
            wrong.append(f"request {index + 1}: status {expanded.status}: {expanded.error}")
        elif base.status == expanded.status == 200:
            both += 1
            shares.append(agreement(base.text, expanded.text))
    if not both and not wrong:
        return Item(name, NOT_CHECKED, "the base arm answers none of the requests")
    if wrong:
        return _item(name, len(r.requests), wrong, "")
    same = sum(share == 1 for share in shares)
    return Item(name, PASS if same == both else DIFFERS,
                f"{both} of {len(r.requests)} on both arms; {same} greedy answers are the same, on average the first "
                f"{sum(shares) / both:.0%} of the text is. The text of an answer is no contract; its quality is "
                "measured by `vocabext eval`", len(r.requests))


def streams(r: Rehearsal) -> Item:
    """The parts of a stream are valid UTF-8, belong together, and add up to the answer that is not streamed."""
    name, wrong, tried = "streams add up", [], 0
    for index in range(len(r.requests)):
        for arm in ARMS:
            whole = r.replay(arm, index)
            streamed = r.replay(arm, index, stream=True, stream_options={"include_usage": True})
            if whole.status != 200 or (whole.document.get("choices") or [{}])[0].get("message", {}).get("tool_calls"):
                continue
            tried += 1
            fault = stream_fault(streamed, whole)
            if fault:
                wrong.append(f"request {index + 1}, {arm} arm: {fault}")
    return _item(name, tried, wrong, f"{tried} streams")


def stream_fault(streamed: Reply, whole: Reply) -> str:
    """Return what is wrong with a stream, given the same answer as a whole."""
    if streamed.status != 200:
        return f"status {streamed.status}: {streamed.error}"
    texts, ids, usage = [], set(), {}
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
        return f"its parts add up to {text[:80]!r}, the whole is {whole.text[:80]!r}"
    if usage.get("completion_tokens") != whole.usage.get("completion_tokens"):
        return f"it counts {usage.get('completion_tokens')} tokens, the whole {whole.usage.get('completion_tokens')}"
    return ""


def stop_strings(r: Rehearsal) -> Item:
    """A stop string that sits inside a new token stops the answer before it."""
    name, wrong, tried = "stop strings", [], 0
    prompt = r.prompts()[0]
    for token in _long_tokens(r):
        inside = token.token.strip()[1:3]
        expected = token.token[: token.token.index(inside)]
        reply = r.complete(EXPANDED, prompt, logit_bias={str(token.token_id): FORCE}, max_tokens=4, stop=[inside])
        tried += 1
        if reply.status != 200 or inside in reply.text or reply.choice.get("finish_reason") != "stop":
            wrong.append(f"{inside!r} inside of {token.token!r}: status {reply.status}, text "
                         f"{reply.text if reply.status == 200 else reply.error!r}")
        elif reply.text.strip() != expected.strip():
            wrong.append(f"{inside!r} inside of {token.token!r}: text {reply.text!r}, expected {expected!r}")
    for index, (_, body) in enumerate(r.requests):
        stops = body.get("stop") or []
        for arm in ARMS if stops else ():
            reply = r.replay(arm, index)
            tried += 1
            if reply.status == 200 and any(s in reply.text for s in ([stops] if isinstance(stops, str) else stops)):
                wrong.append(f"request {index + 1}, {arm} arm: the answer contains a stop string")
    return _item(name, tried, wrong, f"{tried} cases; new tokens were forced, and the answer stops inside of them")


def max_tokens(r: Rehearsal) -> Item:
    """`max_tokens` is kept; the same number is more text."""
    name, wrong, characters = "max_tokens", [], dict.fromkeys(ARMS, 0)
    prompt = r.prompts()[0]
    for arm in ARMS:
        reply = r.complete(arm, prompt, max_tokens=7, ignore_eos=True)
        if reply.status != 200:
            if arm == BASE:
                return Item(name, NOT_CHECKED, f"the base arm refuses: {reply.error}")
            wrong.append(f"{arm} arm: status {reply.status}: {reply.error}")
        elif reply.usage.get("completion_tokens") != 7 or reply.choice.get("finish_reason") != "length":
            wrong.append(f"{arm} arm: {reply.usage.get('completion_tokens')} tokens, finish_reason "
                         f"{reply.choice.get('finish_reason')}")
        else:
            characters[arm] = len(reply.text)
    longest = max(r.manifest.tokens, key=lambda token: len(token.run))
    return _item(name, len(ARMS), wrong, f"the number of tokens is kept on both arms ({characters[BASE]} and "
                 f"{characters[EXPANDED]} characters for 7 tokens here). A new token counts as one and stands for up "
                 f"to {len(longest.run)} base tokens ({longest.token!r}), so the same limit lets answers be longer",
                 DIFFERS)


def logprobs(r: Rehearsal) -> Item:
    """Log-probabilities belong to the tokens of the text, one for each."""
    name, wrong = "logprobs", []
    for arm in ARMS:
        reply = r.complete(arm, r.prompts()[0], logprobs=2, max_tokens=6)
        if reply.status != 200:
            if arm == BASE:
                return Item(name, NOT_CHECKED, f"the base arm refuses: {reply.error}")
            wrong.append(f"{arm} arm: {reply.error}")
            continue
        found = reply.choice["logprobs"]
        if len(found["tokens"]) != len(found["token_logprobs"]) or len(found["tokens"]) != reply.usage[
                "completion_tokens"]:
            wrong.append(f"{arm} arm: {len(found['tokens'])} tokens, {len(found['token_logprobs'])} numbers, "
                         f"{reply.usage['completion_tokens']} counted")
        new = {token.token for token in r.manifest.tokens}
        if arm == BASE and (leaked := [t for row in found["top_logprobs"] for t in row or () if t in new]):
            wrong.append(f"base arm: the new token {leaked[0]!r} is among the alternatives")
    return _item(name, len(ARMS), wrong, "one for each token on both arms. Per token they do not compare between the "
                 "arms (a new token's is that of a longer text), and on the base arm of one engine the new tokens are "
                 "left out: there can be fewer alternatives", DIFFERS)


def echo(r: Rehearsal) -> Item:
    """`echo` gives the prompt back before the answer."""
    name, wrong, tried = "echo", [], 0
    for prompt in r.prompts()[:10]:
        replies = {arm: r.complete(arm, prompt, echo=True, max_tokens=2) for arm in ARMS}
        if replies[BASE].status != 200 or not _begins(replies[BASE].text, prompt):
            continue
        tried += 1
        expanded = replies[EXPANDED]
        if expanded.status != 200 or not _begins(expanded.text, prompt):
            wrong.append(f"{prompt[:60]!r} came back as {expanded.text[:60] if expanded.status == 200 else expanded.error!r}")
    return _item(name, tried, wrong, f"{tried} prompts came back")


def _begins(text: str, prompt: str) -> bool:
    return text.strip().startswith(prompt.strip())


def logit_bias(r: Rehearsal) -> Item:
    """A bias by base ids works on the same tokens as before."""
    name, wrong, tried = "logit_bias by base ids", [], 0
    prompt = r.prompts()[0]
    for token in _long_tokens(r):
        forced = token.run[-1]
        replies = {arm: r.complete(arm, prompt, logit_bias={str(forced): FORCE}, max_tokens=3, ignore_eos=True)
                   for arm in ARMS}
        if replies[BASE].status != 200:
            continue
        tried += 1
        texts = [replies[arm].text if replies[arm].status == 200 else replies[arm].error for arm in ARMS]
        if texts[0] != texts[1]:
            wrong.append(f"id {forced} forced: {texts[0]!r} on the base arm, {texts[1]!r} on the expanded one")
    return _item(name, tried, wrong, f"{tried} base ids forced, with the same text on both arms. A bias against a base "
                 "id does not reach a new token that contains it: clients who ban words by ids must ban the new "
                 "token's id as well (vocabext.json lists the runs)", DIFFERS)


def several(r: Rehearsal) -> Item:
    """`n` answers come under the numbers 0 to n - 1."""
    name, wrong = "n > 1", []
    for arm in ARMS:
        reply = r.complete(arm, r.prompts()[0], n=3, temperature=1.0, max_tokens=4)
        indices = [choice["index"] for choice in reply.document.get("choices", ())]
        if reply.status != 200 or sorted(indices) != [0, 1, 2]:
            wrong.append(f"{arm} arm: status {reply.status}, choices {indices} {reply.error}")
    return _item(name, len(ARMS), wrong, "three answers on both arms")


def prompt_ids(r: Rehearsal) -> Item:
    """A prompt of base ids is read as it is."""
    name, wrong, tried, same = "prompts given as ids", [], 0, 0
    for prompt in r.prompts()[:10]:
        tokens = r.ask(BASE, "/tokenize", prompt=prompt)
        if tokens.status != 200:
            continue
        ids = tokens.document["tokens"]
        replies = {arm: r.complete(arm, ids) for arm in ARMS}
        if replies[BASE].status != 200:
            continue
        tried += 1
        same += replies[BASE].text == replies[EXPANDED].text if replies[EXPANDED].status == 200 else 0
        if (count := replies[EXPANDED].usage.get("prompt_tokens")) != len(ids):
            wrong.append(f"{len(ids)} ids were counted as {count} {replies[EXPANDED].error}")
    return _item(name, tried, wrong, f"{tried} prompts of base ids are read as they are on both arms, and {same} have the "
                 "same greedy answer. They are not shortened: only text is")


def json_mode(r: Rehearsal) -> Item:
    """Structured output is valid."""
    name, wrong, tried = "JSON mode", [], 0
    for kind in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "ok", "schema": SCHEMA}}):
        for arm in ARMS:
            reply = r.ask(arm, "/v1/chat/completions", messages=[{"role": "user", "content": r.prompts()[0][:200]}],
                          response_format=kind, max_tokens=60, temperature=0)
            if reply.status != 200:
                if arm == BASE:
                    break
                wrong.append(f"{kind['type']}: status {reply.status}: {reply.error}")
            elif reply.choice.get("finish_reason") == "stop":
                tried += 1
                try:
                    json.loads(reply.text)
                except ValueError:
                    wrong.append(f"{kind['type']}, {arm} arm: {reply.text[:80]!r} is no JSON")
    return _item(name, tried, wrong, f"{tried} complete answers are valid JSON", none="the base arm gave no complete "
                 "answer in 60 tokens, or has no chat template")


def tool_calls(r: Rehearsal) -> Item:
    """A tool that must be called is called with valid arguments."""
    name, wrong, tried, reason = "tool calls", [], 0, ""
    for arm in ARMS:
        reply = r.ask(arm, "/v1/chat/completions", messages=[{"role": "user", "content": "Take a note."}],
                      tools=[TOOL], tool_choice="required", max_tokens=100, temperature=0)
        if reply.status != 200:
            if arm == BASE:
                reason = reply.error
                break
            wrong.append(f"status {reply.status}: {reply.error}")
            continue
        tried += 1
        calls = reply.choice["message"].get("tool_calls") or []
        try:
            json.loads(calls[0]["function"]["arguments"])
        except (IndexError, ValueError):
            if reply.choice.get("finish_reason") != "length":
                wrong.append(f"{arm} arm: no valid call in {json.dumps(reply.choice)[:200]}")
    return _item(name, tried, wrong, "called with valid arguments on both arms",
                 none=f"the base arm makes none: {reason}")


def usage(r: Rehearsal) -> Item:
    """The numbers of tokens add up, and the expanded arm never counts more for a prompt."""
    name, wrong, totals, tried = "usage", [], dict.fromkeys(ARMS, 0), 0
    for index in range(len(r.requests)):
        found = {arm: r.replay(arm, index) for arm in ARMS}
        if any(reply.status != 200 for reply in found.values()):
            continue
        tried += 1
        for arm, reply in found.items():
            totals[arm] += reply.usage["prompt_tokens"]
            if reply.usage["total_tokens"] != reply.usage["prompt_tokens"] + reply.usage["completion_tokens"]:
                wrong.append(f"request {index + 1}, {arm} arm: {reply.usage}")
        if found[EXPANDED].usage["prompt_tokens"] > found[BASE].usage["prompt_tokens"]:
            wrong.append(f"request {index + 1}: {found[BASE].usage['prompt_tokens']} prompt tokens on the base arm, "
                         f"{found[EXPANDED].usage['prompt_tokens']} on the expanded one")
    share = 1 - totals[EXPANDED] / totals[BASE] if totals[BASE] else 0.0
    return _item(name, tried, wrong, f"prompts count {totals[BASE]} tokens on the base arm and {totals[EXPANDED]} on the "
                 f"expanded one ({share:.1%} fewer). Bills, quotas and rate limits by tokens change by that much",
                 DIFFERS)


def prefix_cache(r: Rehearsal) -> Item:
    """A prompt that is asked twice has one answer, and is not read twice."""
    name, wrong, cached = "prefix cache", [], dict.fromkeys(ARMS, 0)
    prompt = (" ".join(r.prompts()) + " ")[:2000]
    told = False
    for arm in ARMS:
        limit = {"truncate_prompt_tokens": min(r.context - 20, 400)} if r.context else {}
        one, two = (r.complete(arm, prompt, **limit) for _ in range(2))
        if one.status != 200:
            if arm == BASE:
                return Item(name, NOT_CHECKED, f"the base arm refuses: {one.error}")
            wrong.append(f"status {one.status}: {one.error}")
            continue
        if one.text != two.text:
            wrong.append(f"{arm} arm: {one.text[:60]!r}, then {two.text[:60]!r}")
        details = two.usage.get("prompt_tokens_details") or {}
        told = told or "cached_tokens" in details
        cached[arm] = details.get("cached_tokens") or 0
    numbers = (f"{cached[BASE]} and {cached[EXPANDED]} tokens came from the cache" if told else
               "the engine does not say how much came from the cache (--enable-prompt-tokens-details)")
    return _item(name, len(ARMS), wrong, f"the same answer twice on both arms; {numbers}. The arms share no prefixes "
                 "where new tokens occur, so a swap begins with a cold cache", DIFFERS)


def long_prompts(r: Rehearsal) -> Item:
    """What fits into the context on the base arm fits on the expanded one."""
    name = "prompts near the context limit"
    if not r.context:
        return Item(name, NOT_CHECKED, "the server does not say how long its context is")
    text = " ".join(r.prompts())
    fitting = _text_of_length(r, text, r.context - 4)
    if fitting is None:
        return Item(name, NOT_CHECKED, "no prompt near the limit could be made from the requests")
    wrong = []
    prompt, count = fitting
    replies = {arm: r.complete(arm, prompt, max_tokens=r.context - count) for arm in ARMS}
    if replies[BASE].status != 200:
        return Item(name, NOT_CHECKED, f"the base arm refuses {count} tokens of {r.context}: {replies[BASE].error}")
    if replies[EXPANDED].status != 200:
        wrong.append(f"{count} base tokens: status {replies[EXPANDED].status}: {replies[EXPANDED].error}")
    beyond = {arm: r.complete(arm, prompt + " " + text[:200], max_tokens=1) for arm in ARMS}
    if beyond[BASE].status == 400 and beyond[EXPANDED].status not in (200, 400):
        wrong.append(f"beyond the limit: status {beyond[EXPANDED].status}, the base arm's is 400")
    said = ("the expanded arm takes a prompt that is too long for the base arm" if beyond[BASE].status == 400
            and beyond[EXPANDED].status == 200 else "beyond the limit both arms refuse alike")
    return _item(name, 2, wrong, f"a prompt of {count} of {r.context} base tokens is answered on both arms; {said}. The "
                 "context is counted in tokens: more text fits, and after a rollback that text no longer does", DIFFERS)


def _text_of_length(r: Rehearsal, text: str, tokens: int) -> tuple[str, int] | None:
    """Return a text of nearly `tokens` base tokens, and their number."""
    whole = text
    while len(whole) < tokens * 12:
        whole += " " + text
    low, high, found = 0, len(whole), None
    for _ in range(14):
        middle = (low + high) // 2
        reply = r.ask(BASE, "/tokenize", prompt=whole[:middle])
        if reply.status != 200:
            return None
        count = reply.document["count"]
        if count <= tokens:
            low, found = middle, (whole[:middle], count)
        else:
            high = middle
    return found if found and found[1] > tokens - 12 else None


def _long_tokens(r: Rehearsal) -> list[Any]:
    """Return new tokens with enough characters to look into."""
    return [token for token in r.manifest.tokens if len(token.token.strip()) >= 4
            and token.token.strip()[1:3].isalnum() and token.token.find(token.token.strip()[1:3]) >= 1][:TRIED_TOKENS]


def _item(name: str, tried: int, wrong: list[str], detail: str, verdict: str = PASS, *, none: str = "") -> Item:
    if wrong:
        return Item(name, FAIL, f"{len(wrong)} of {tried} went wrong", tried, tuple(wrong[:3]))
    if not tried:
        return Item(name, NOT_CHECKED, none or "no request of this kind worked on the base arm")
    return Item(name, verdict, detail, tried)


ITEMS: dict[str, Callable[[Rehearsal], Item]] = {
    "every request is answered": answers, "streams add up": streams, "stop strings": stop_strings,
    "max_tokens": max_tokens, "logprobs": logprobs, "echo": echo, "logit_bias by base ids": logit_bias,
    "n > 1": several, "prompts given as ids": prompt_ids, "JSON mode": json_mode, "tool calls": tool_calls,
    "usage": usage, "prefix cache": prefix_cache, "prompts near the context limit": long_prompts,
}
