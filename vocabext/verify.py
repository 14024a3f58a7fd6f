"""Verify that an expanded checkpoint still means what its base meant.

Every check looks at what is on the disk, not at what an earlier stage believed. A check passes, fails,
or says why it was not made; all of them run, so that one report names everything that is wrong.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vocabext.checkpoint import Checkpoint, open_checkpoint, read_json, resolve_model
from vocabext.errors import CheckpointError, TokenizerError
from vocabext.expansion import Expansion
from vocabext.manifest import Manifest, read_manifest
from vocabext.progress import Progress, no_progress
from vocabext.records import Document
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, load_expanded, load_tokenizer

VERIFY_NAME = "verify.json"
PASS, FAIL, SKIPPED = "pass", "fail", "not checked"
NUM_ADVERSARIAL = 20_000
# A row this many times longer than the longest base row would win every softmax it is in.
MAX_NORM_RATIO = 3.0
LOGIT_TEXTS, LOGIT_TOKENS = 8, 64
PLAIN_TEXTS = ("The quick brown fox jumps over the lazy dog.", "1, 2, 3; (a) [b] {c}", "In the beginning",
               "    return x + 1\n", "¿Qué tal? Ça va. Привет, 世界!", "A list of things:\n- one\n- two")  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name: What was checked.
        verdict: `pass`, `fail` or `not checked`.
        detail: What was found, or why it was not checked.
    """

    name: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class Verification:
    """All verdicts on one checkpoint."""

    model: str
    against: str
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != FAIL for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the content of verify.json."""
        return {"artifact": "verify", "version": 1, "passed": self.passed, "model": self.model,
                "against": self.against, "seconds": self.seconds, "checks": [asdict(c) for c in self.checks]}


class _FaultError(Exception):
    """A check found something wrong; the message says what."""


class _NotCheckedError(Exception):
    """A check could not be made; the message says why."""


def verify(
    folder: Path, against: str, documents: Iterable[Document] | None = None, *, trust_remote_code: bool = False,
    seed: int = 0, load_weights: bool = True, progress: Progress = no_progress,
) -> Verification:  # fmt: skip
    """Run every check on an expanded checkpoint.

    Args:
        folder: The expanded checkpoint.
        against: The base: folder or hub id.
        documents: Text to try the invariant on, besides the generated one.
        trust_remote_code: Passed to transformers for the base.
        seed: Seed of the generated text.
        load_weights: Whether to load both models and compare their logits.
        progress: Where to report.

    Raises:
        UsageError: If `folder` or the base does not exist.
        CheckpointError: If `folder` is no expanded checkpoint at all, or the base is damaged.
        TokenizerError: If the base has no tokenizer.
        CorpusError: If a text cannot be read.
    """
    began = time.monotonic()
    pair = _Pair(folder, against, read_manifest(folder), trust_remote_code, seed)
    _ = pair.base, pair.base_tokenizer  # a base that cannot be read is no fault of the checkpoint
    checks: list[tuple[str, Callable[[], str]]] = [
        ("untouched tensors equal", lambda: _untouched_tensors(pair)),
        ("old rows bit-identical", lambda: _old_rows(pair)),
        ("new rows plausible", lambda: _new_rows(pair)),
        ("config agrees", lambda: _config(pair)),
        ("files carried over", lambda: _files(pair)),
        ("old token ids kept", lambda: _old_ids(pair)),
        ("invariant on the corpus", lambda: _invariant_on_corpus(pair, documents)),
        ("invariant on adversarial text", lambda: _invariant_on_adversarial(pair)),
        # Behind the other two: what they saw in context need not be searched for.
        ("new tokens reachable and readable", lambda: _new_tokens(pair)),
        ("loads in transformers, same logits", lambda: _same_logits(pair, load_weights)),
    ]
    verdicts = []
    with progress("verifying", len(checks), "checks") as task:
        for name, check in checks:
            task.note(name)
            verdicts.append(_verdict(name, check))
            task.advance()
    return Verification(str(folder), against, tuple(verdicts), time.monotonic() - began)


def _verdict(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, PASS, check())
    except _NotCheckedError as reason:
        return Check(name, SKIPPED, str(reason))
    except (_FaultError, CheckpointError, TokenizerError) as fault:
        return Check(name, FAIL, str(fault))


@dataclass
class _Pair:
    """The two checkpoints, opened when a check first asks for them."""

    folder: Path
    against: str
    manifest: Manifest
    trust_remote_code: bool
    seed: int
    seen: set[int] = field(default_factory=set)  # ids that the new tokenizer produced in any text

    @cached_property
    def base_folder(self) -> Path:
        return resolve_model(self.against)

    @cached_property
    def base(self) -> Checkpoint:
        return open_checkpoint(self.base_folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def new(self) -> Checkpoint:
        return open_checkpoint(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def base_tokenizer(self) -> BaseTokenizer:
        return load_tokenizer(self.base_folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def expansion(self) -> Expansion:
        return Expansion([record.new_token for record in self.manifest.tokens], self.manifest.first_new_id)

    @cached_property
    def new_tokenizer(self) -> ExpandedTokenizer:
        return load_expanded(self.folder, self.expansion)


# -- weights ------------------------------------------------------------------------------------------------------

def _untouched_tensors(pair: _Pair) -> str:
    old, new = set(pair.base.tensors), set(pair.new.tensors)
    if old != new:
        raise _FaultError(f"missing tensors: {sorted(old - new)[:3]}, unexpected tensors: {sorted(new - old)[:3]}")
    names = sorted(old - set(pair.base.vocab_tensors))
    for name in names:
        a, b = pair.base.tensors[name], pair.new.tensors[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise _FaultError(f"{name} is {a.dtype} {list(a.shape)} in the base and {b.dtype} {list(b.shape)} here")
        if pair.base.digest(name) != pair.new.digest(name):
            raise _FaultError(f"the bytes of {name} differ from the base")
    return f"{len(names)} tensors, {sum(pair.base.tensors[n].num_bytes for n in names):,} bytes"


def _old_rows(pair: _Pair) -> str:
    first, end = pair.expansion.first_new_id, pair.expansion.first_new_id + pair.expansion.num_new
    kept = 0
    for name in pair.base.vocab_tensors:
        old_VD, new_VD = pair.base.read(name), pair.new.read(name)
        if old_VD.dtype != new_VD.dtype or old_VD.shape[1] != new_VD.shape[1]:
            raise _FaultError(f"{name} is {old_VD.dtype} of width {old_VD.shape[1]} in the base, "
                         f"{new_VD.dtype} of width {new_VD.shape[1]} here")
        if len(new_VD) < max(len(old_VD), end):
            raise _FaultError(f"{name} has {len(new_VD)} rows; {max(len(old_VD), end)} are needed")
        for start, stop in ((0, first), (end, len(old_VD))):
            same = _bits(old_VD[start:stop]) == _bits(new_VD[start:stop])
            if not bool(same.all()):
                row = start + int((~same.flatten(1).all(1)).nonzero()[0])
                raise _FaultError(f"row {row} of {name} differs from the base")
            kept += max(0, stop - start)
    return f"{kept:,} rows in {', '.join(pair.base.vocab_tensors)}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _new_rows(pair: _Pair) -> str:
    first, end = pair.expansion.first_new_id, pair.expansion.first_new_id + pair.expansion.num_new
    worst = 0.0
    for name in pair.new.vocab_tensors:
        matrix_VD = pair.new.read(name).float()
        new_N, old_U = matrix_VD[first:end].norm(dim=1), matrix_VD[:first].norm(dim=1)
        for i, norm in enumerate(new_N.tolist()):
            if not np.isfinite(norm) or norm == 0:
                raise _FaultError(f"the row of {pair.expansion.tokens[i].token!r} in {name} has norm {norm}")
        ratio = float(new_N.max() / old_U.max())
        if ratio > MAX_NORM_RATIO:
            token = pair.expansion.tokens[int(new_N.argmax())].token
            raise _FaultError(f"the row of {token!r} in {name} is {ratio:.1f} times as long as the longest base row")
        worst = max(worst, ratio)
    return f"{pair.expansion.num_new:,} rows, the longest {worst:.2f} times the longest base row"


def _config(pair: _Pair) -> str:
    old, new = _flat(pair.base.config), _flat(pair.new.config)
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    wrong = {k for k in changed if k.split(".")[-1] != "vocab_size"}
    if wrong:
        key = min(wrong)
        raise _FaultError(f"config.json: {key} is {new.get(key)!r}, in the base {old.get(key)!r}")
    sizes = {k: v for k, v in new.items() if k.split(".")[-1] == "vocab_size"}
    rows = {name: pair.new.tensors[name].shape[0] for name in pair.new.vocab_tensors}
    if len({*sizes.values(), *rows.values()}) != 1:
        raise _FaultError(f"config.json says {sizes}, the stored rows are {rows}")
    last = pair.expansion.first_new_id + pair.expansion.num_new - 1
    if last >= pair.new.vocab_size:
        raise _FaultError(f"the last new id is {last}, but there are only {pair.new.vocab_size} rows")
    return f"vocab_size {pair.new.vocab_size:,} (base {pair.base.vocab_size:,}), last id {last:,}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}


def _files(pair: _Pair) -> str:
    record = pair.manifest.files
    for name in record.carried_over:
        source, target = pair.base_folder / name, pair.folder / name
        if not target.is_file():
            raise _FaultError(f"{name} was carried over and is missing now")
        if source.is_file() and source.read_bytes() != target.read_bytes():
            raise _FaultError(f"{name} differs from the base")
    for name in record.rewritten:
        if not (pair.folder / name).is_file():
            raise _FaultError(f"{name} is missing")
    for name in record.left_out:
        if (pair.folder / name).is_file():
            raise _FaultError(f"{name} is in the folder, though it was left out: {record.left_out[name]}")
    counts = len(record.carried_over), len(record.rewritten), len(record.left_out)
    return "{} carried over, {} rewritten, {} left out".format(*counts)


# -- tokenizer ----------------------------------------------------------------------------------------------------

def _old_ids(pair: _Pair) -> str:
    old, new = pair.base_tokenizer.hf, pair.new_tokenizer.hf
    before, after = old.get_vocab(), new.get_vocab()
    for token, i in before.items():
        if after.get(token) != i:
            raise _FaultError(f"{token!r} had the id {i} and has {after.get(token)} now")
    expected = {t.key: pair.expansion.first_new_id + i for i, t in enumerate(pair.expansion.tokens)}
    extra = {t: i for t, i in after.items() if t not in before}
    if extra != expected:
        odd = sorted(set(extra.items()) ^ set(expected.items()))[0]
        raise _FaultError(f"the new tokens are not those of vocabext.json, for example {odd}")
    for name, value in old.special_tokens_map.items():
        if new.special_tokens_map.get(name) != value:
            raise _FaultError(f"{name} is {new.special_tokens_map.get(name)!r}, in the base {value!r}")
    if old.chat_template != new.chat_template:
        raise _FaultError("the chat template differs from the base")
    if pair.base_tokenizer.prefix_ids != pair.new_tokenizer.prefix_ids:
        raise _FaultError(f"prompts begin with {pair.new_tokenizer.prefix_ids}, in the base with "
                     f"{pair.base_tokenizer.prefix_ids}")
    return f"{len(before):,} ids, {len(pair.base_tokenizer.added)} added tokens, {len(expected):,} new"


def _new_tokens(pair: _Pair) -> str:
    base, new = pair.base_tokenizer, pair.new_tokenizer
    contexts = list(itertools.product(("", "x", "x ", ". ", "\n", "("), ("", " ", " y", ".", ",", "\n", ")")))
    missing = {i: t for i, t in enumerate(pair.expansion.tokens) if pair.expansion.first_new_id + i not in pair.seen}
    for before, after in contexts if missing else ():
        wanted = list(missing.items())
        found = new.encode_batch([before + t.token + after for _, t in wanted])
        for (index, _), ids in zip(wanted, found, strict=True):
            if pair.expansion.first_new_id + index in ids:
                del missing[index]
        if not missing:
            break
    if missing:
        raise _FaultError(f"{len(missing)} tokens are produced neither in the texts nor in {len(contexts)} contexts, "
                          f"for example {next(iter(missing.values())).token!r}")
    for index, token in enumerate(pair.expansion.tokens):
        alone, pieces = new.decode([pair.expansion.first_new_id + index]), base.decode(token.run)
        if alone != pieces:
            raise _FaultError(f"the token {token.token!r} reads {alone!r}, its pieces read {pieces!r}")
    return f"{pair.expansion.num_new:,} tokens"


def _invariant_on_corpus(pair: _Pair, documents: Iterable[Document] | None) -> str:
    if documents is None:
        raise _NotCheckedError("no --corpus was given")
    count, new, total = 0, 0, 0
    for batch in _batches(document.text for document in documents):
        for text, base_ids, new_ids in _both(pair, batch):
            _check_invariant(pair, text, base_ids, new_ids)
            new += int(pair.expansion.is_new(new_ids).sum())
            total += len(new_ids)
        count += len(batch)
    return f"{count:,} documents, {new / max(1, total):.1%} of their tokens new"


def _invariant_on_adversarial(pair: _Pair) -> str:
    new = 0
    for batch in _batches(adversarial_texts(pair.base_tokenizer, pair.expansion, NUM_ADVERSARIAL, pair.seed)):
        for text, base_ids, new_ids in _both(pair, batch):
            _check_invariant(pair, text, base_ids, new_ids)
            found, wanted = pair.new_tokenizer.decode(new_ids), pair.base_tokenizer.decode(base_ids)
            if found != wanted:
                raise _FaultError(f"{text!r} decodes to {found!r}, in the base to {wanted!r}")
            new += int(pair.expansion.is_new(new_ids).sum())
    return f"{NUM_ADVERSARIAL:,} texts with {new:,} new tokens, none changed"


def adversarial_texts(base: BaseTokenizer, expansion: Expansion, count: int, seed: int) -> Iterator[str]:
    """Generate text that hurts tokenizers: new tokens glued to each other, to odd characters and specials.

    Args:
        base: The base tokenizer, for its special tokens.
        expansion: The new tokens.
        count: How many texts.
        seed: Seed of the choice.
    """
    rng = random.Random(seed)
    tokens = [t.token for t in expansion.tokens]
    odd = [" ", "  ", "\n", "\r\n", "\t", "\x00", "\u00a0", "\u200d", "\u0301", "\u2581", "é", "ß", "漢字", "😀", "ا",
           "Ж", *"abzAZ019.,;:!?'’\"()-_/<>|@#", "'s", "<0x0A>", "<0xE2>", "0x0A>", *base.added]  # fmt: skip
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 6)):
            part = rng.choice(tokens) if rng.random() < 0.5 else rng.choice(odd)
            if rng.random() < 0.2:  # a part of a token, or the token in another shape
                start = rng.randint(0, len(part))
                cut = part[start : rng.randint(start, len(part))]
                part = rng.choice([cut, part[:start], part.upper(), part.strip(), part.title()])
            parts.append(part)
        yield "".join(parts)


def _both(pair: _Pair, texts: Sequence[str]) -> Iterator[tuple[str, list[int], list[int]]]:
    return zip(texts, pair.base_tokenizer.encode_batch(texts), pair.new_tokenizer.encode_batch(texts), strict=True)


def _check_invariant(pair: _Pair, text: str, base_ids: list[int], new_ids: list[int]) -> None:
    pair.seen.update(new_ids)
    back = pair.expansion.unmerge(new_ids)
    if len(back) != len(base_ids) or not np.array_equal(back, base_ids):
        at = next((i for i, (a, b) in enumerate(zip(back, base_ids, strict=False)) if a != b), 0)
        near = pair.base_tokenizer.decode(base_ids[max(0, at - 5) : at + 5])
        was, now = base_ids[at : at + 5], back[at : at + 5].tolist()
        raise _FaultError(f"the invariant fails near {near!r}: base ids {was} became {now}")


def _batches(texts: Iterable[str], size: int = 512) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


# -- behaviour ----------------------------------------------------------------------------------------------------

def _same_logits(pair: _Pair, load_weights: bool) -> str:
    from vocabext.model import load_model

    if not load_weights:
        raise _NotCheckedError("loading the weights was switched off")
    prompts = []
    for text, base_ids, new_ids in _both(pair, PLAIN_TEXTS):
        framed = [*pair.base_tokenizer.prefix_ids, *base_ids][:LOGIT_TOKENS]
        if base_ids == new_ids and framed:
            prompts.append((text, torch.tensor([framed])))
    if not prompts:
        raise _NotCheckedError("all plain test sentences contain new tokens")
    found = []
    for folder in (pair.base_folder, pair.folder):
        model = load_model(folder, trust_remote_code=pair.trust_remote_code)
        with torch.no_grad():
            found.append([model.model(ids.to(model.device)).logits[0, :, : pair.expansion.first_new_id].float().cpu()
                          for _, ids in prompts])  # fmt: skip
        epsilon = torch.finfo(model.dtype).eps
        del model
    exact = True
    for (text, _), old, new in zip(prompts, *found, strict=True):
        exact &= torch.equal(old, new)
        # A wider head may be multiplied by another kernel, which rounds differently in the last place.
        if not torch.allclose(old, new, rtol=4 * epsilon, atol=4 * epsilon * float(old.abs().max())):
            raise _FaultError(f"the logits of {text!r} differ by up to {float((old - new).abs().max()):.3g}")
    return f"{len(prompts)} texts without new tokens, {'bit-equal' if exact else 'equal up to rounding'}"


def read_verification(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's verify.json, None if there is none."""
    path = folder / VERIFY_NAME
    return read_json(path) if path.is_file() else None
