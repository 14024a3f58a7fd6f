"""The stage: text, training, and the files that `patch` makes a folder of.

The base is loaded once. Its layers get an adapter, and the new rows become parameters; the base itself is the same
model with the adapter switched off. What comes out is a rows file and a plain peft folder, so the new folder's body is
the base's, bit for bit.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vocabext.checkpoint.folder import Checkpoint, Rows, open_checkpoint, resolve_model, save_rows
from vocabext.checkpoint.manifest import ADAPTER_FOLDER, HEAL_NAME, Manifest, base_record, read_manifest
from vocabext.checkpoint.vocabulary import HEAD_BIAS
from vocabext.corpus import Document, left_out_of
from vocabext.errors import CorpusError, UsageError
from vocabext.files.atomic import write_json
from vocabext.files.ranges import file_sha256
from vocabext.heal.student import Student
from vocabext.heal.targets import UnitShares
from vocabext.heal.text import sample_documents, windows_of
from vocabext.heal.train import HealPoint, Training
from vocabext.model.adapter import add_adapter, require_peft, save_adapter
from vocabext.model.frozen import FrozenModel, load_model, pick_device
from vocabext.model.support import check_runs
from vocabext.options import HealConfig
from vocabext.progress import Progress, no_progress
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, load_base_of, load_expanded
from vocabext.tokens import Expansion, Ids

ROWS_NAME = "rows.safetensors"
TRAINING_FOLDER = "training"
BYTES_PER_ID = 8  # of UTF-8, of an expanded id, at most as a mean
OFTEN = 3  # base ids that are in the text so often are looked at in every step


@dataclass(frozen=True)
class Healed:
    """What `heal` made.

    Attributes:
        rows: The rows file.
        adapter: The peft folder.
        curve: Divergence on held-out text while training.
        best: The point of it that was kept.
        report: The content of heal.json.
    """

    rows: Path
    adapter: Path
    curve: tuple[HealPoint, ...]
    best: HealPoint
    report: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the content of heal.json."""
        return self.report


@dataclass(frozen=True)
class Text:
    """Where text comes from.

    Attributes:
        documents: The documents.
        sources: What they are called in heal.json.
    """

    documents: Iterable[Document]
    sources: Sequence[str]


@dataclass(frozen=True)
class _Models:
    """The base and its expansion."""

    manifest: Manifest
    base_folder: Path
    base: BaseTokenizer
    expanded: ExpandedTokenizer
    checkpoint: Checkpoint

    @property
    def expansion(self) -> Expansion:
        return self.expanded.expansion


def heal(
    folder: Path, against: str, corpus: Text, config: HealConfig, work: Path, *, general: Text | None = None,
    trust_remote_code: bool = False, progress: Progress = no_progress, say: Callable[[str], None] = lambda _: None,
) -> Healed:
    """Train an adapter and the new rows of an expanded checkpoint, and leave both in a working folder.

    Interrupted, a call with the same arguments goes on where it stopped, with the same result.

    Args:
        folder: The expanded checkpoint; only read.
        against: The base: folder or hub id; only read.
        corpus: Text of the domain.
        config: The options.
        work: Where everything is put.
        general: Other text, of which the model must not forget anything.
        trust_remote_code: Run code that comes with the base model.
        progress: Where to report.
        say: Told what a user should know, a line at a time.

    Raises:
        MissingExtraError: If peft is not installed.
        UsageError: If `against` is not the base of `folder`, or cannot be run on rows.
        CorpusError: If there is too little text.
    """
    require_peft()
    pair = _open(folder, against, trust_remote_code)
    model = load_model(pair.base_folder, device=config.device, dtype=_dtype(config),
                       trust_remote_code=trust_remote_code)
    with progress("reading text", 2 if general else 1, "corpora") as task:
        held_out, windows = _windows(corpus, pair, config, config.text, say)
        task.advance()
        if general is not None:
            share = config.general_share * len(windows) / (1 - config.general_share)
            other_held_out, other = _windows(general, pair, config, round(share * config.window), say)
            windows = _shuffled([*windows[: _count(config) - len(other)], *other], config.seed)
            task.advance()
        else:
            other_held_out = []
    _check_window(model, [*held_out, *windows, *other_held_out], pair, config)
    student = _student(model, pair, windows, config)
    work.mkdir(exist_ok=True)
    facts = {"model": against, "rows": _rows_digests(pair), "dtype": str(model.dtype), "device": model.device.type}
    row_rate = config.row_rate * float(model.embedding_VD.float().square().mean().sqrt())
    training = Training(student, windows, [*held_out, *other_held_out], _often(windows, pair.expansion), config,
                        row_rate, work / TRAINING_FOLDER, facts)
    best = training.run(progress)
    if best.step < training.steps:
        say(f"the adapter is kept as it was after {best.step:,} of {training.steps:,} steps: later ones made held-out "
            "text worse; a lower --learning-rate may help")
    report = {
        "artifact": "heal", "version": 1, "model": str(folder), "against": against, "options": asdict(config),
        "corpus": list(corpus.sources), "general": list(general.sources) if general else [],
        "left_out": left_out_of(corpus.documents),
        "windows": len(windows), "held_out_windows": len(held_out), "general_held_out_windows": len(other_held_out),
        "steps": training.steps, "seconds": training.seconds, "cpu_seconds": training.cpu_seconds,
        "adapter_parameters": sum(weight.numel() for weight in student.weights),
        "curve": [{**asdict(point), "total": point.total} for point in training.curve], "kept_step": best.step}
    made = _save(student, pair, work, report, against, config)
    training.forget()
    return Healed(*made, tuple(training.curve), best, report)


def _open(folder: Path, against: str, trust_remote_code: bool) -> _Models:
    manifest, base_folder = read_manifest(folder), resolve_model(against)
    if manifest.merged:
        raise UsageError(f"{folder} holds a merged adapter, so its body is not the base's; heal the folder that it was "
                         "made from")
    check_runs(base_folder, trust_remote_code=trust_remote_code)
    base = load_base_of(base_folder, manifest.first_new_id, trust_remote_code=trust_remote_code)
    if manifest.first_new_id != base.first_new_id:
        raise UsageError(f"{folder} was made from {manifest.base.model} with {manifest.first_new_id} token ids, but "
                         f"{against} has {base.first_new_id}; pass the model it was made from as --against")
    tokens = [record.new_token for record in manifest.tokens]
    return _Models(manifest, base_folder, base, load_expanded(folder, Expansion(tokens, manifest.first_new_id)),
                 open_checkpoint(folder, trust_remote_code=trust_remote_code))


def _dtype(config: HealConfig) -> str:
    """Return the dtype to compute in: processors without matrix units train slower in 16 bits than in 32."""
    slow = pick_device(config.device).type == "cpu" and not torch.cpu._is_amx_tile_supported()
    return "float32" if config.dtype == "auto" and slow else config.dtype


def _check_window(model: FrozenModel, windows: Sequence[Ids], pair: _Models, config: HealConfig) -> None:
    longest = max(map(len, pair.expansion.unmerge_batch(windows)))
    if longest > model.max_positions:
        raise UsageError(f"--window is {config.window} expanded ids, which are up to {longest} base ids of this text, "
                         f"and the model takes {model.max_positions}; pass a smaller one")


def _count(config: HealConfig) -> int:
    return config.text // (config.window * config.batch) * config.batch


def _windows(text: Text, pair: _Models, config: HealConfig, num_ids: int, say: Callable[[str], None]
             ) -> tuple[list[Ids], list[Ids]]:
    """Draw documents and cut them into held-out windows and windows to learn from; no document is in both."""
    count = max(1, num_ids // config.window)
    name = ", ".join(text.sources)
    texts = sample_documents(text.documents, (count + config.held_out) * config.window * BYTES_PER_ID, config.seed)
    prefix = pair.base.prefix_ids
    texts, held_out = _held_out(texts, pair, config)
    windows = windows_of(texts, pair.expanded, prefix, config.window, count)
    if not windows or not held_out:
        raise CorpusError(f"the text from {name} does not fill two windows of {config.window} ids, one "
                          "to learn from and one held out; give more text, or pass a smaller --window")
    if len(windows) < count:
        say(f"{name} gives {len(windows) * config.window:,} ids of text, fewer than "
            f"{count * config.window:,}; all of it is read once")
    return held_out, windows


def _held_out(texts: list[str], pair: _Models, config: HealConfig) -> tuple[list[str], list[Ids]]:
    """Set documents aside, an eighth at most; returns the others, and the windows."""
    size, wanted = 0, config.held_out * config.window * BYTES_PER_ID
    bound = min(wanted, sum(len(text) for text in texts) // 8)
    count = 0
    while count < len(texts) and size < bound:
        size, count = size + len(texts[count]), count + 1
    found = windows_of(texts[:count], pair.expanded, pair.base.prefix_ids, config.window, config.held_out)
    return texts[count:], found


def _shuffled(windows: list[Ids], seed: int) -> list[Ids]:
    return [windows[i] for i in np.random.default_rng(seed).permutation(len(windows))]


def _student(model: FrozenModel, pair: _Models, windows: Sequence[Ids], config: HealConfig) -> Student:
    new = slice(pair.expansion.first_new_id, pair.expansion.end_id)
    checkpoint = pair.checkpoint
    input_ND = checkpoint.read(checkpoint.vocab_tensors[0])[new]
    output_ND = None if checkpoint.tied else checkpoint.read(checkpoint.vocab_tensors[-1])[new]
    biases = [name for name, tensor in checkpoint.row_tensors.items() if tensor.role == HEAD_BIAS]
    bias_N = checkpoint.read(biases[0])[new] if biases else None
    shares = UnitShares.counted(pair.expansion, windows)
    return Student(model, add_adapter(model, config.rank, config.seed), pair.expansion, shares, input_ND, output_ND,
                   bias_N, config.objective)


def _often(windows: Sequence[Ids], expansion: Expansion) -> torch.Tensor:
    """Tell which base ids the text often has, or new tokens are made of."""
    counts = sum((np.bincount(ids, minlength=expansion.first_new_id) for ids in expansion.unmerge_batch(windows)),
                 np.zeros(expansion.first_new_id, np.int64))
    often = torch.from_numpy(counts >= OFTEN)
    often[[piece for token in expansion.tokens for piece in token.run]] = True
    return often


def _rows_digests(pair: _Models) -> dict[str, str | None]:
    return {name: record.new_rows_sha256 for name, record in pair.manifest.tensors.items()}


def _save(student: Student, pair: _Models, work: Path, report: dict[str, Any], against: str, config: HealConfig
          ) -> tuple[Path, Path]:
    tokens = pair.expansion.tokens
    checkpoint = pair.checkpoint
    base = open_checkpoint(pair.base_folder)
    header = {"base": base_record(pair.base_folder, base.names, model=against,
                                  first_new_id=pair.expansion.first_new_id),
              "method": "heal", "options": asdict(config),
              "per_token": [record.distill for record in pair.manifest.tokens]}
    output_ND = None if checkpoint.tied else student.output_ND
    save_rows(work / ROWS_NAME, tokens, Rows(student.input_ND, output_ND), header)
    save_adapter(student.adapter, work / ADAPTER_FOLDER, against)
    report["sha256"] = {f"{ADAPTER_FOLDER}/{path.name}": file_sha256(path)
                        for path in sorted((work / ADAPTER_FOLDER).iterdir())}
    if any(not math.isfinite(float(row.detach().abs().max())) for row in student.rows):
        raise UsageError("the training ended in numbers that are not finite; pass a lower --learning-rate")
    write_json(work / HEAL_NAME, report)
    return work / ROWS_NAME, work / ADAPTER_FOLDER
