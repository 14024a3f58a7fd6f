"""What the machine can do, and what a run takes of it: matrix products per second, memory."""

import ctypes
import gc
import os
import platform
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

MIB = 2**20
CPUINFO = Path("/proc/cpuinfo")
STATM = Path("/proc/self/statm")
# Between two looks at the memory in use: short enough to see what one training step allocates.
LOOK_SECONDS = 0.01
PEAK_SECONDS = 1.0


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Measures wall time and processor time of this process from its making on, and can be stopped."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronize(device)
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return wall seconds and processor seconds."""
        synchronize(self._device)
        return time.monotonic() - self._wall, time.process_time() - self._cpu

    @contextmanager
    def stopped(self) -> Iterator[tuple[float, float]]:
        """Stand still within a block, which gets the times."""
        wall, cpu = self.read()
        yield wall, cpu
        wall_then, cpu_then = self.read()
        self._wall, self._cpu = self._wall + wall_then - wall, self._cpu + cpu_then - cpu


def resident_bytes() -> int:
    """Return the memory that this process holds; where the system does not tell, the most it ever held."""
    if STATM.is_file():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


class PeakMemory:
    """Watches the memory in use within a `with` block: of the GPU, or of this process where there is none.

    Attributes:
        before_bytes: In use at the start, after giving back what is free.
        peak_bytes: Most that was in use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stop = device, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before_bytes = self.peak_bytes = 0

    @property
    def rise_bytes(self) -> int:
        """Most that was in use, beyond what was at the start."""
        return self.peak_bytes - self.before_bytes

    def lap(self) -> int:
        """Return the peak until now, and begin a new one."""
        self._look()
        peak, self.peak_bytes = self.peak_bytes, 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._look()
        return peak

    def __enter__(self) -> "PeakMemory":
        release_memory(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before_bytes = torch.cuda.memory_allocated(self._device)
        else:
            self.before_bytes = resident_bytes()
            self._thread.start()
        self._look()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._look()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        cuda = self._device.type == "cuda"
        now = torch.cuda.max_memory_allocated(self._device) if cuda else resident_bytes()
        self.peak_bytes = max(self.peak_bytes, now)

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._look()


def release_memory(device: torch.device) -> None:
    """Give memory that nobody uses back, so that one run's leavings do not count for the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def matrix_peak(dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int] | None = None) -> float:
    """Return the most FLOP/s that matrix products reach here.

    Args:
        dtype: Of the factors.
        device: Where.
        shape: Rows, inner size and columns; None takes a square that is large for the device.
    """
    size = 8192 if device.type == "cuda" else 2048
    rows, inner, columns = shape or (size, size, size)
    left, right = (torch.randn(lines, inner, device=device).to(dtype) for lines in (rows, columns))
    best, until = float("inf"), time.monotonic() + PEAK_SECONDS
    while time.monotonic() < until:
        synchronize(device)
        began = time.perf_counter()
        torch.nn.functional.linear(left, right)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * columns / best


def _processor() -> str:
    """Return the name of the processor where the system tells it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe(device: torch.device) -> dict[str, object]:
    """Return what a reader must know about the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "instructions": torch.backends.cpu.get_cpu_capability(), "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
            "load_average": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d", time.gmtime())}
