"""The engines behind the two arms: what reaches them, and whether they answer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.arms import BASE, EXPANDED, Arm
from vocabext.serve.gateway.calls import Call, Request, plain_call
from vocabext.serve.gateway.front import BaseFront
from vocabext.serve.gateway.upstream import Upstream


@dataclass
class Engines:
    """The two arms and the way to them.

    Attributes:
        arms: The two arms by name.
        upstream: Connections to the engines.
        front: Puts base ids in place of text, where the expanded engine serves both arms; None otherwise.
        model: What clients call the model.
        healthy: Whether each arm's engine answered its last health check.
    """

    arms: Mapping[str, Arm]
    upstream: Upstream
    front: BaseFront | None = None
    model: str = ""
    healthy: dict[str, bool] = field(default_factory=dict)

    @property
    def are_one(self) -> bool:
        """Whether one engine bears the load of both arms."""
        return self.arms[BASE].url == self.arms[EXPANDED].url

    @property
    def names(self) -> frozenset[str]:
        """The names under which clients may ask for the model."""
        return frozenset([self.model, *(arm.model for arm in self.arms.values())])

    async def call_for(self, request: Request, arm: Arm) -> Call:
        """Return a request as an arm's engine gets it.

        Raises:
            Refusal: If the base arm of one engine cannot answer it.
        """
        if self.front is None or arm.name != BASE:
            return plain_call(request, arm, self.names)
        return await self.front.call(request, arm, self.names, self.upstream)

    async def post(
        self, arm: str, path: str, value: Mapping[str, Any], headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """Ask an arm's engine, under its own name of the model.

        Raises:
            Refusal: 502 if the engine does not answer with status 200; else as in `Upstream.call`.
        """
        engine = self.arms[arm]
        body = json.dumps({"model": engine.model, **value}).encode()
        status, answer = await self.upstream.post_json(engine.url + path, body, arm=arm, headers=headers)
        if status != 200:
            raise Refusal(502, f"the engine of the {arm} arm answered with status {status}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def statuses(self) -> dict[str, str]:
        """Return `ok` or `down` for each arm."""
        return {name: "ok" if self.healthy.get(name) else "down" for name in self.arms}
