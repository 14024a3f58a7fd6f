"""The gateway's state: its policy, how it got there, and where its admin endpoint listens.

One JSON file, written to a temporary sibling and renamed, readable by its owner alone (it holds the admin
endpoint's token). A gateway that is killed at any moment finds the last policy that it acknowledged, but for a
rollback that could not be written: going back must not wait for a disk.
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from vocabext.errors import ServerError, UsageError
from vocabext.files.atomic import atomic_file
from vocabext.serve.gateway.policy import Policy

VERSION = 1
KEPT_CHANGES = 100
MOST_BYTES = 2**20  # of a state file
SAME_START_SECONDS = 1.0


@dataclass
class State:
    """What survives a restart.

    Attributes:
        path: The file.
        policy: The policy in force.
        serial: Number of changes so far.
        changes: The last changes, newest last: when, by whom, why, and the policy that followed.
        admin_url: Where the admin endpoint listens; empty while no gateway runs.
        token: The secret that the gateway and its operators share; each start of the gateway makes a new one.
        process_id: The gateway's process; 0 while none runs.
        process_started: When that process began, in seconds since 1970: a later process may have its id.
        unsaved: Why the file does not hold what is in force; empty if it does.
    """

    path: Path
    policy: Policy
    serial: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)
    admin_url: str = ""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    process_id: int = 0
    process_started: float = 0.0
    unsaved: str = ""

    def opened(self, admin_url: str) -> None:
        """Write down where this process listens, with a secret that no earlier gateway had.

        Raises:
            OSError: If the file cannot be written.
        """
        process = psutil.Process()
        self.admin_url, self.token = admin_url, secrets.token_urlsafe(24)
        self.process_id, self.process_started = process.pid, process.create_time()
        self.save()

    def closed(self) -> None:
        """Write down that no gateway listens any more, if the file can be written."""
        self.admin_url, self.process_id, self.process_started = "", 0, 0.0
        with suppress(OSError):
            self.save()

    def is_killed(self) -> bool:
        """Tell whether the process that listened has ended without a word; one of another machine looks the same."""
        try:
            return bool(self.process_id) and abs(
                psutil.Process(self.process_id).create_time() - self.process_started) > SAME_START_SECONDS
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def change(self, policy: Policy, *, by: str, reason: str = "") -> None:
        """Put a policy in force: on disk first, then here.

        Args:
            policy: The new policy.
            by: `operator` or `canary`.
            reason: Why.

        Raises:
            OSError: If the file cannot be written; the old policy stays in force.
        """
        changes = self._changes(policy, by, reason)
        self._write(policy, self.serial + 1, changes)
        self.policy, self.serial, self.changes = policy, self.serial + 1, changes

    def roll_back(self, *, by: str, reason: str = "") -> None:
        """Put the policy to go back to in force: here first, then on disk if that can be; `unsaved` says so.

        Args:
            by: `operator` or `canary`.
            reason: Why.
        """
        policy = self.policy.rolled_back()
        self.changes = self._changes(policy, by, reason)
        self.policy, self.serial = policy, self.serial + 1
        self.try_to_save()

    def try_to_save(self) -> bool:
        """Write the file as it is, and tell whether that could be done."""
        try:
            self.save()
        except (OSError, UsageError) as error:
            self.unsaved = f"{self.path} cannot be written ({getattr(error, 'strerror', None) or error})"
        return not self.unsaved

    def _changes(self, policy: Policy, by: str, reason: str) -> list[dict[str, Any]]:
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "by": by, "reason": reason,
                 "policy": policy.to_json(), "serial": self.serial + 1}
        return [*self.changes, entry][-KEPT_CHANGES:]

    def save(self) -> None:
        """Write the file as it is."""
        self._write(self.policy, self.serial, self.changes)

    def _write(self, policy: Policy, serial: int, changes: list[dict[str, Any]]) -> None:
        document = {"artifact": "gateway-state", "version": VERSION, "policy": policy.to_json(), "serial": serial,
                    "changes": changes, "admin_url": self.admin_url, "token": self.token,
                    "process_id": self.process_id, "process_started": self.process_started}
        with atomic_file(self.path) as file:
            os.fchmod(file.fileno(), 0o600)
            json.dump(document, file, indent=2)
        self.unsaved = ""


def read_state(path: Path) -> State:
    """Read a state file.

    Raises:
        UsageError: If it is missing, damaged, or something else; says what to do.
    """
    try:
        if not path.is_file() and path.exists():
            raise UsageError(f"{path} is no file; name another --state")
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UsageError(f"{path} has more than {MOST_BYTES} bytes; it is not the state of a gateway")
        document = json.loads(text)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; start `vocabext serve gateway` first, or name its --state") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as the state of a gateway ({error}); move it away to start with "
                         "all requests on base") from None
    if not isinstance(document, dict) or document.get("artifact") != "gateway-state":
        raise UsageError(f"{path} is not the state of a gateway; name another --state")
    if document.get("version") != VERSION:
        raise UsageError(f"{path} has format version {document.get('version')}, this vocabext reads {VERSION}")
    try:
        return _state_of(path, document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, UsageError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {error}); move it away to start with all "
                         "requests on base") from None


def _state_of(path: Path, document: dict[str, Any]) -> State:
    if not (token := str(document["token"])) or not token.isascii() or not token.isprintable():
        raise ValueError("the token is not one that a gateway makes")
    return State(path, Policy.from_json(document["policy"]), int(document["serial"]),
                 [_change_of(row) for row in document["changes"]], str(document["admin_url"]), token,
                 int(document.get("process_id", 0)), float(document.get("process_started", 0.0)))


def _change_of(row: dict[str, Any]) -> dict[str, Any]:
    """Check one change of the history."""
    texts = {name: row[name] for name in ("time", "by", "reason")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("a change says when, by whom and why in strings")
    return {**texts, "policy": Policy.from_json(row["policy"]).to_json(), "serial": int(row["serial"])}


def open_state(path: Path, initial: Policy) -> State:
    """Read a state file, or make one where there is none.

    Args:
        path: The file.
        initial: The policy of a new one.

    Raises:
        UsageError: If the file is there and cannot be used: a policy is never guessed.
    """
    if path.exists():
        return read_state(path)
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder {path.absolute().parent} does not exist; create it, or name another --state")
    salted = Policy(initial.expanded_percent, initial.mirror_percent, secrets.token_hex(16))
    state = State(path, salted)
    state.save()
    return state


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a state file for one gateway.

    Raises:
        ServerError: If another gateway holds it.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise ServerError(f"another gateway uses {path}; stop it, or name another --state") from None
    try:
        yield
    finally:
        lock.release()
