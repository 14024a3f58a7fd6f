"""The admin endpoint: status, swap, rollback. A server of its own, on loopback, that wants the state file's token."""

import asyncio
import hmac
import json
from collections.abc import Callable
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from vocabext.errors import CheckpointError, ServerError, UsageError
from vocabext.serve.engine import ask_local
from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.arms import ARMS, EXPANDED
from vocabext.serve.gateway.guard import read_body
from vocabext.serve.gateway.policy import Policy
from vocabext.serve.gateway.state import State
from vocabext.serve.gateway.trial import Trial

TOKEN_HEADER = "x-vocabext-token"
DISK_SECONDS = 0.5
ORDER_BYTES = 2**16


def admin_application(
    trial: Trial, health: Callable[[], dict[str, Any]], check_folders: Callable[[], None] = lambda: None
) -> Starlette:
    """Return the application that operators talk to.

    Args:
        trial: The policy, and the comparison under it.
        health: Returns what the gateway tells everybody of itself.
        check_folders: Raises `CheckpointError` if a folder is not as it was verified; asked before the expanded arm
            gets a larger share, never before a rollback.
    """
    state = trial.state

    def report() -> dict[str, Any]:
        return {**health(), "expanded_percent": trial.policy.expanded_percent,
                "mirror_percent": trial.policy.mirror_percent, "serial": state.serial, "changes": state.changes[-10:],
                "unsaved": state.unsaved, "canary": None if trial.canary is None else trial.canary.to_json()}

    def allowed(request: Request) -> bool:
        return hmac.compare_digest(request.headers.get(TOKEN_HEADER, ""), state.token)

    async def status(request: Request) -> JSONResponse:
        return JSONResponse(report()) if allowed(request) else _no("the token is missing or wrong", 401)

    async def swap(request: Request) -> JSONResponse:
        if not allowed(request):
            return _no("the token is missing or wrong", 401)
        try:
            body = await read_body(request.receive, dict(request.headers.raw), ORDER_BYTES, lambda _: None)
            order = json.loads(body)
            reason = str(order.get("reason", ""))
            if order.get("rollback"):
                pending = await roll_back(trial, reason)
                return JSONResponse({**report(), **({"unsaved": pending} if pending else {})})
            policy, serial = ordered(trial.policy, order), state.serial
            if policy.expanded_percent > trial.policy.expanded_percent:
                await asyncio.to_thread(check_folders)
            if state.serial != serial:  # a rollback that came meanwhile stays in force
                return _no("the policy changed while the folders were checked; swap again", 409)
            trial.set_policy(policy, by="operator", reason=reason)
        except Refusal as refusal:
            return _no(refusal.message, refusal.status)
        except (UsageError, ValueError, TypeError, AttributeError) as error:
            return _no(str(error), 400)
        except CheckpointError as error:
            return _no(str(error), 409)
        except OSError as error:
            return _no(f"the state cannot be written ({error.strerror}), so nothing has changed", 500)
        return JSONResponse(report())

    app = Starlette(routes=[Route("/status", status), Route("/swap", swap, methods=["POST"])])
    app.router.redirect_slashes = False  # it would send clients to the host that they named
    return app


async def roll_back(trial: Trial, reason: str) -> str:
    """Roll back; wait for the disk a moment, and no longer: the rollback is in force before it is written.

    Returns:
        Why it is not known yet whether it is saved; empty if it is known.
    """
    trial.side_tasks.attach()
    task = asyncio.ensure_future(asyncio.to_thread(trial.roll_back, by="operator", reason=reason))
    done, _ = await asyncio.wait({task}, timeout=DISK_SECONDS)
    if done:
        task.result()
        return ""
    return f"{trial.state.path} is being written, and the disk is slow"


def ordered(policy: Policy, order: dict[str, Any]) -> Policy:
    """Return the policy that an order makes of the one in force.

    Args:
        policy: The one in force.
        order: Any of `to` with `percent`, and `mirror_percent`. A new share without it mirrors nothing: copies are a
            load of their own, and whoever ordered them did it for another share.

    Raises:
        UsageError: If it is no order.
    """
    share, to, mirror = policy.expanded_percent, order.get("to"), order.get("mirror_percent")
    if to is not None:
        if to not in ARMS:
            raise UsageError(f"the arm is {to!r}; it must be {' or '.join(ARMS)}")
        percent = 100.0 if order.get("percent") is None else order["percent"]
        share = Policy(percent).expanded_percent
        share = share if to == EXPANDED else 100 - share
    if mirror is None:
        mirror = policy.mirror_percent if to is None else 0.0
    return Policy(share, mirror, policy.salt)


def _no(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def send_order(state: State, order: dict[str, Any] | None) -> dict[str, Any]:
    """Send an order to the gateway that a state file belongs to.

    Args:
        state: The content of the file.
        order: As in `ordered`, or `rollback`; None to ask for the status.

    Returns:
        The status afterwards.

    Raises:
        UsageError: If the gateway refuses the order.
        ServerError: If there is no gateway.
    """
    url = f"{state.admin_url}/{'status' if order is None else 'swap'}"
    try:
        if not state.admin_url:
            raise ValueError("it has not been started")
        answer = ask_local(url, order, headers={TOKEN_HEADER: state.token}, timeout_seconds=30.0)
        document: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(f"no gateway answers for {state.path} ({error}); is `vocabext serve gateway` running?"
                          ) from None
    if answer.is_success:
        return document
    kind = UsageError if answer.status_code == 400 else ServerError
    raise kind(f"the gateway refuses: {document['error']['message']}")
