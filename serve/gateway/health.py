"""Whether the engines answer, and whether the one engine of both arms still bans new tokens from the base arm."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from vocabext.errors import ServerError
from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.arms import BASE, Arm
from vocabext.serve.gateway.engines import Engines
from vocabext.serve.gateway.front import BaseFront, check_ban
from vocabext.serve.gateway.metrics import Metrics
from vocabext.serve.gateway.upstream import Upstream

HEALTH_SECONDS = 2.0
BAN_SECONDS = 60.0  # longest time for the trial that the ban holds
AWAY = "the engine was away, and it is not known yet whether it still bans new tokens; try again in a moment"


class Health:
    """Looks after the engines."""

    def __init__(
        self, engines: Engines, metrics: Metrics, headers: Mapping[str, str], note: Callable[[str], None]
    ) -> None:
        """Begin without knowing anything.

        Args:
            engines: `healthy` says what was found.
            metrics: Show it.
            headers: What the engines want to be told.
            note: Told when an engine stops to answer, or answers again.
        """
        self._engines, self._metrics, self._headers, self._note = engines, metrics, headers, note

    async def watch(self) -> None:
        """Check for as long as the gateway runs."""
        healthy = self._engines.healthy
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            before = dict(healthy)
            await self.check()
            for name in self._engines.arms:
                if before.get(name) and not healthy[name]:
                    self._note(f"the engine of the {name} arm does not answer")
                elif not before.get(name) and healthy[name]:
                    self._note(f"the engine of the {name} arm answers again")

    def lost(self, url: str) -> None:
        """Take note that the engine at a URL has died, before the next check would notice or miss it."""
        for arm in self._engines.arms.values():
            if arm.url == url:
                self._found(arm, answers=False)
        if self._engines.front is not None:
            self._engines.front.trouble = AWAY

    async def check(self) -> None:
        """Ask the engine of each arm once."""
        await asyncio.gather(*(self._ask(arm) for arm in self._engines.arms.values()))

    async def _ask(self, arm: Arm) -> None:
        engines = self._engines
        try:
            async with asyncio.timeout(5.0):
                async with engines.upstream.call("GET", f"{arm.url}/health", arm=arm.name) as response:
                    answers = response.status == 200
        except (Refusal, TimeoutError):
            answers = False
        if engines.front is not None and arm.name == BASE:
            answers = await self._may_be_asked(engines.front, arm, answers)
        self._found(arm, answers=answers)

    def _found(self, arm: Arm, *, answers: bool) -> None:
        self._engines.healthy[arm.name] = answers
        self._metrics.healthy.labels(arm.name).set(answers)

    async def _may_be_asked(self, front: BaseFront, base: Arm, answers: bool) -> bool:
        """Tell whether base requests may reach the one engine: after each absence, only once it was tried again.

        Whoever started it anew may have left out the logits processor.
        """
        if not answers:
            front.trouble = AWAY
        elif before := front.trouble:
            try:
                async with asyncio.timeout(BAN_SECONDS):
                    front.trouble = await ban_fault(self._engines.upstream, front, base.url, self._headers)
            except (Refusal, ServerError, TimeoutError):
                front.trouble = AWAY
            if front.trouble not in ("", before):
                self._note(f"the base arm is not served: {front.trouble}")
        return not front.trouble


async def ban_fault(upstream: Upstream, front: BaseFront, url: str, headers: Mapping[str, str]) -> str:
    """Return why base requests must not reach the one engine; empty if it bans new tokens from them.

    Raises:
        Refusal: If the engine cannot be asked.
        ServerError: If it lists no model.
    """
    card = await served_model(upstream, url, BASE, headers)
    front.context = int(card.get("max_model_len") or 0)
    return await check_ban(upstream, front, url, card["id"], headers)


async def served_model(upstream: Upstream, url: str, arm: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return what a server says of the model that it serves.

    Raises:
        Refusal: If it cannot be asked.
        ServerError: If it lists no model.
    """
    document = await upstream.get_json(f"{url}/v1/models", arm=arm, headers=headers)
    try:
        card = dict(document["data"][0])
        return {**card, "id": str(card["id"])}
    except (KeyError, IndexError, TypeError, ValueError):
        raise ServerError(f"the server of the {arm} arm at {url} lists no model; is it a vLLM server?") from None
