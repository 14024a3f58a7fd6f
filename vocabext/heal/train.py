"""The training: every window once, a warm-up, a linear decay, and the state that did best on held-out text."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vocabext.files.atomic import atomic_file, read_object, write_json
from vocabext.heal.loss import Head
from vocabext.heal.student import Student
from vocabext.heal.text import Batch
from vocabext.model.adapter import adapter_tensors
from vocabext.options import HealConfig
from vocabext.progress import Progress
from vocabext.tokens import Ids

WARM_UP, CLIP = 0.05, 1.0
LOOKS = 4  # how often held-out text is looked at
KEPT_SECONDS = 60.0  # between two states that are kept for a restart
STATE, BEST, LOG = "state.safetensors", "best.safetensors", "log.json"


@dataclass(frozen=True)
class HealPoint:
    """One point of the held-out curve.

    Attributes:
        step: Steps done.
        ids: Expanded ids seen.
        first_pieces: KL(base || healed) of the first piece, nats per place.
        units: The divergence of units with the same first piece, nats per place.
    """

    step: int
    ids: int
    first_pieces: float
    units: float

    @property
    def total(self) -> float:
        """What is minimised."""
        return self.first_pieces + self.units


@torch.no_grad()
def measure(student: Student, windows: Sequence[Ids], at_once: int, head: Head | None = None) -> tuple[float, float]:
    """Return the divergence on windows, of first pieces and of units, nats per place.

    Args:
        student: The healed model.
        windows: Expanded ids.
        at_once: How many go through the model together.
        head: The head, thinned; None for the whole.
    """
    first, units = 0.0, 0.0
    for low in range(0, len(windows), at_once):
        some = windows[low : low + at_once]
        found = student.loss(Batch.of(some, student.expansion), head)
        first, units = first + found.first_pieces * len(some), units + found.units * len(some)
    return first / len(windows), units / len(windows)


class Training:
    """A training that can be killed at any moment, and goes on with the same result."""

    def __init__(self, student: Student, windows: Sequence[Ids], held_out: Sequence[Ids], often_V: torch.Tensor,
                 config: HealConfig, row_rate: float, work: Path, facts: Mapping[str, Any]) -> None:
        """Set up the optimizer.

        Args:
            student: What is trained.
            windows: The text, in the order in which it is read.
            held_out: Text that it is judged by.
            often_V: Base ids that are often in text.
            config: The options.
            row_rate: Peak step size of the rows.
            work: Where states are kept.
            facts: What decides about the result besides; states that were made under others are not taken.
        """
        self.student, self.windows, self.held_out, self.often_V = student, windows, held_out, often_V
        self.config, self.work, self.steps = config, work, len(windows) // config.batch
        self.optimizer = torch.optim.AdamW(
            [{"params": student.weights, "lr": config.learning_rate}, {"params": student.rows, "lr": row_rate}],
            betas=(0.9, 0.99), weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.digest = hashlib.sha256(json.dumps({**facts, **asdict(config)}, sort_keys=True, default=str).encode()
                                     + b"".join(window.tobytes() for window in windows)).hexdigest()
        self.step, self.curve, self.seconds, self.cpu_seconds = 0, list[HealPoint](), 0.0, 0.0

    def run(self, progress: Progress) -> HealPoint:
        """Train to the end, and leave the student as it was at the best point of the curve; returns that point."""
        self._resume()
        self._clocks = time.monotonic() - self.seconds, time.process_time() - self.cpu_seconds
        looks = {round(self.steps * i / LOOKS) for i in range(LOOKS + 1)}
        kept = time.monotonic()
        if not self.curve:
            self._look()
        with progress("healing", self.steps, "steps") as task:
            task.skip(self.step)
            while self.step < self.steps:
                loss = self._one()
                self.step += 1
                if self.step in looks:
                    self._look()
                    task.note(f"held-out {self.curve[-1].total:.4f}")
                elif self.step % 10 == 0 and not self.curve[1:]:
                    task.note(f"loss {loss:.4f}")
                task.advance()
                if time.monotonic() - kept > KEPT_SECONDS:
                    kept = time.monotonic()
                    self._keep()
        self._keep()
        best = min(self.curve, key=lambda point: point.total)
        self._load(self.work / BEST)
        return best

    def forget(self) -> None:
        """Delete what was kept."""
        shutil.rmtree(self.work, ignore_errors=True)

    # -- a step ---------------------------------------------------------------------------------------------------

    def _one(self) -> float:
        low = self.step * self.config.batch
        batch = Batch.of(self.windows[low : low + self.config.batch], self.student.expansion)
        scale = min(1.0, (self.step + 1) / max(1.0, WARM_UP * self.steps)) * (1 - self.step / self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        loss = self.student.loss(batch, self.student.head.thinned(self.often_V, generator)).total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], CLIP)
        if math.isfinite(float(norm)):  # a step that has no number is left out; held-out text will tell
            self.optimizer.step()
        return float(loss.detach())

    def _look(self) -> None:
        # Thinned in the same way each time, so that the points of the curve compare.
        head = self.student.head.thinned(self.often_V, torch.Generator().manual_seed(self.config.seed))
        point = HealPoint(self.step, self.step * self.config.batch * self.config.window,
                      *measure(self.student, self.held_out, self.config.batch, head))
        self.curve.append(point)
        if math.isfinite(point.total) and point.total <= min(other.total for other in self.curve):
            self._write(BEST, self._tensors())

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, torch.Tensor]:
        rows = {f"row.{i}": row for i, row in enumerate(self.student.rows)}
        return {**adapter_tensors(self.student.adapter), **rows}

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._tensors()  # type: ignore[return-value]

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        from safetensors.torch import save

        self.work.mkdir(exist_ok=True)
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        with atomic_file(self.work / name, "wb") as file:
            file.write(save(plain, metadata={"digest": self.digest, "step": str(self.step)}))

    def _keep(self) -> None:
        began, cpu_began = self._clocks
        self.seconds, self.cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        state = dict(self._tensors())
        for name, parameter in self._parameters().items():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if parameter in self.optimizer.state:
                    state[f"{key}:{name}"] = self.optimizer.state[parameter][key]
        self._write(STATE, state)
        write_json(self.work / LOG, {"digest": self.digest, "step": self.step, "seconds": self.seconds,
                                     "cpu_seconds": self.cpu_seconds,
                                     "curve": [asdict(point) for point in self.curve]})

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[name])
        return tensors

    def _resume(self) -> None:
        """Go on from a kept state of this very training, if there is one."""
        log = read_object(self.work / LOG)
        if log is None or log.get("digest") != self.digest or self._kept_step() != log["step"]:
            self.forget()
            return
        tensors = self._load(self.work / STATE)
        for name, parameter in self._parameters().items():
            if f"step:{name}" in tensors:
                self.optimizer.state[parameter] = {key: tensors[f"{key}:{name}"].to(
                    "cpu" if key == "step" else parameter.device) for key in ("exp_avg", "exp_avg_sq", "step")}
        self.step, self.seconds = int(log["step"]), float(log["seconds"])
        self.cpu_seconds = float(log.get("cpu_seconds", 0.0))
        self.curve = [HealPoint(**point) for point in log["curve"]]

    def _kept_step(self) -> int | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.work / STATE, "pt") as file:
                found = file.metadata() or {}
        except (SafetensorError, OSError):
            return None
        return int(found["step"]) if found.get("digest") == self.digest else None
