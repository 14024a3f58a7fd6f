"""The admin endpoint on loopback: status, swap, rollback, for those who can read the state file.

The state file's token is a secret that both sides know. `serve swap` never sends it: whoever listens at a dead
gateway's address would get it. It has the gateway prove that it knows the token, and signs its order with it:

    GET  /challenge, x-vocabext-nonce: A          ->  {"nonce": B, "proof": HMAC(token, "gateway" A B)}
    POST /swap, x-vocabext-nonce: B, x-vocabext-signature: HMAC(token, "POST /swap" B body)

B is good for one order. Scripts may send the token itself, as `x-vocabext-token`, if they trust the address.
"""

import asyncio
import hmac
import json
import secrets
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from vocabext.errors import CheckpointError, ServerError, UsageError
from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.arms import ARMS, EXPANDED
from vocabext.serve.gateway.guard import read_body
from vocabext.serve.gateway.policy import Policy
from vocabext.serve.gateway.state import State
from vocabext.serve.gateway.trial import Trial

TOKEN_HEADER, NONCE_HEADER, SIGNATURE_HEADER = "x-vocabext-token", "x-vocabext-nonce", "x-vocabext-signature"
MOST_NONCES = 1_000
ORDER_SECONDS = 30.0
DISK_SECONDS = 0.5
ORDER_BYTES = 2**16


def signature(token: str, *parts: str | bytes) -> str:
    """Return what only those can know who know the token, for parts that are told apart."""
    whole = b"\0".join(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part for part in parts)
    return hmac.new(token.encode(), whole, "sha256").hexdigest()


class Doorkeeper:
    """Lets those give orders who know the token."""

    def __init__(self, state: State) -> None:
        """Guard the admin endpoint of the gateway that a state belongs to."""
        self._state = state
        self._nonces: OrderedDict[str, None] = OrderedDict()

    def challenge(self, nonce: str) -> dict[str, str]:
        """Prove to somebody that this is the gateway; the answer's nonce is good for one order."""
        mine = secrets.token_urlsafe(16)
        self._nonces[mine] = None
        if len(self._nonces) > MOST_NONCES:
            self._nonces.popitem(last=False)
        return {"nonce": mine, "proof": signature(self._state.token, "gateway", nonce, mine)}

    def allows(self, request: Request, body: bytes) -> bool:
        """Tell whether whoever sent a request knows the token."""
        nonce, given = request.headers.get(NONCE_HEADER, ""), request.headers.get(SIGNATURE_HEADER)
        if given is None:
            return _same(request.headers.get(TOKEN_HEADER, ""), self._state.token)
        known = self._nonces.pop(nonce, 0) is None
        return known and _same(given, signature(self._state.token, f"{request.method} {request.url.path}", nonce, body))


def _same(one: str, another: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), another.encode())


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
    door = Doorkeeper(state)

    def report() -> dict[str, Any]:
        return {**health(), "expanded_percent": trial.policy.expanded_percent,
                "mirror_percent": trial.policy.mirror_percent, "serial": state.serial, "changes": state.changes[-10:],
                "unsaved": state.unsaved, "canary": None if trial.canary is None else trial.canary.to_json()}

    async def challenge(request: Request) -> JSONResponse:
        return JSONResponse(door.challenge(request.headers.get(NONCE_HEADER, "")))

    async def status(request: Request) -> JSONResponse:
        return JSONResponse(report()) if door.allows(request, b"") else _no("the token is missing or wrong", 401)

    async def swap(request: Request) -> JSONResponse:
        try:
            body = await read_body(request.receive, dict(request.headers.raw), ORDER_BYTES, lambda _: None)
        except Refusal as refusal:
            return _no(refusal.message, refusal.status)
        if not door.allows(request, body):
            return _no("the token is missing or wrong", 401)
        try:
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
        except (UsageError, ValueError, TypeError, AttributeError, RecursionError) as error:
            return _no(str(error), 400)
        except CheckpointError as error:
            return _no(str(error), 409)
        except OSError as error:
            return _no(f"the state cannot be written ({error.strerror}), so nothing has changed", 500)
        return JSONResponse(report())

    app = Starlette(routes=[Route("/challenge", challenge), Route("/status", status),
                            Route("/swap", swap, methods=["POST"])])
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
    """Send an order to the gateway that a state file belongs to; the file's secret does not leave this process.

    Args:
        state: The content of the file.
        order: As in `ordered`, or `rollback`; None to ask for the status.

    Returns:
        The status afterwards.

    Raises:
        UsageError: If the gateway refuses the order, or the file names an address that is none of a gateway's.
        ServerError: If there is no gateway, or something else listens at its address.
    """
    advice = "is `vocabext serve gateway` running?"
    if not state.admin_url:
        raise ServerError(f"no gateway runs for {state.path}: it was stopped, or never started; {advice}")
    _check_address(state)
    gone = f"; its process {state.process_id} has ended without a word" if state.is_killed() else ""
    method, path = ("GET", "/status") if order is None else ("POST", "/swap")
    body, mine = b"" if order is None else json.dumps(order).encode(), secrets.token_urlsafe(16)
    try:
        with httpx.Client(base_url=state.admin_url, timeout=ORDER_SECONDS, trust_env=False) as client:
            found = client.get("/challenge", headers={NONCE_HEADER: mine}).json()
            nonce, proof = str(found["nonce"]), str(found["proof"])
            if not _same(proof, signature(state.token, "gateway", mine, nonce)):
                raise ServerError(f"what listens at {state.admin_url} is not the gateway of {state.path}{gone}; "
                                  f"nothing was sent; {advice}")
            answer = client.request(method, path, content=body, headers={
                NONCE_HEADER: nonce, SIGNATURE_HEADER: signature(state.token, f"{method} {path}", nonce, body)})
            document: dict[str, Any] = answer.json()
            refused = "" if answer.is_success else str(document["error"]["message"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ServerError(f"no gateway answers for {state.path} ({error}){gone}; {advice}") from None
    if refused:
        raise (UsageError if answer.status_code == 400 else ServerError)(f"the gateway refuses: {refused}")
    return document


def _check_address(state: State) -> None:
    """Refuse an address at which no gateway listens: it is always HTTP on loopback.

    Raises:
        UsageError: If the state file names another.
    """
    try:
        parts = urlsplit(state.admin_url)
        sound = (parts.scheme == "http" and ip_address(parts.hostname or "").is_loopback and bool(parts.port)
                 and parts.path in ("", "/") and not parts.username and not parts.query)
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(f"{state.path} has the admin address {state.admin_url[:200]!r}, but a gateway's is "
                         "http://127.0.0.1:PORT; nothing was sent; restart the gateway to have it written anew")
