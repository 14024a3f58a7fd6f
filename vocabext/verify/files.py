"""Which base the checkpoint was made from, which files it holds, and which of them a server may read."""

import fnmatch
from collections.abc import Iterable, Mapping

from vocabext.checkpoint.folder import CONFIG_NAME, INDEX_NAME, PICKLE_PATTERNS
from vocabext.checkpoint.manifest import HEAL_NAME, MANIFEST_NAME
from vocabext.checkpoint.served import file_times, record_files
from vocabext.checkpoint.verdicts import FAIL, Check
from vocabext.files.ranges import Extent, file_sha256, first_difference, same_inode
from vocabext.tokenizer import is_stale
from vocabext.verify.pair import FaultError, NotCheckedError, Pair

OUR_FILES = (MANIFEST_NAME, HEAL_NAME, "verify.json", "eval.json", "lengths.json", "bench.json", "predict.json",
             "report.html", "report.md", "report.json")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "*.gguf", *PICKLE_PATTERNS)


def recorded_base(pair: Pair, *, others_failed: bool) -> str:
    """Compare the base that was given with the one that vocabext.json records.

    Another file may mean the same, so that a difference counts only where some other check failed:
    then the base is the first suspect.

    Args:
        pair: The checkpoints.
        others_failed: Whether any other check failed.
    """
    record = pair.manifest.base
    num_ids = pair.base_tokenizer.first_new_id
    if num_ids != record.num_used_ids:
        raise FaultError(f"--against {pair.against} is another model: it has {num_ids:,} token ids, but this "
                         f"checkpoint was made from {record.model} with {record.num_used_ids:,}; pass that one")
    found = {"config.json": (file_sha256(pair.base_folder / "config.json"), record.config_sha256),
             "tokenizer.json": (file_sha256(pair.base_folder / "tokenizer.json"), record.tokenizer_sha256)}
    if others_failed:  # reading all rows again is for those who need the answer
        names = record.tensors_sha256.keys() & set(pair.base.tensors)
        found |= {name: (pair.base.digest(name), record.tensors_sha256[name]) for name in sorted(names)}
    odd = {name: digests for name, digests in found.items() if digests[0] != digests[1]}
    if not odd:
        return f"made from {record.model}, {num_ids:,} token ids"
    name, (here, recorded) = next(iter(odd.items()))
    said = f"{name} of {pair.against} has the digest {(here or 'none')[:12]}, recorded is {(recorded or 'none')[:12]}"
    if others_failed:
        raise FaultError(f"--against {pair.against} may be another model than {record.model}, from which this "
                         f"checkpoint was made: {said}; pass that one")
    return f"{said}, but no check found a difference"


def recorded(pair: Pair, times: Mapping[str, tuple[int, int]], verdicts: Iterable[Check]) -> str:
    """Record size and digest of each file that a server may read: the verdict is for these files and no others.

    Args:
        pair: The checkpoints; `files` gets the record.
        times: Size and time of change of these files before the first check.
        verdicts: Those of all other checks.
    """
    if any(check.verdict == FAIL for check in verdicts):
        raise NotCheckedError("a check failed, so that nothing is to be served")
    found = record_files(pair.folder, pair.carried_sha256)
    now = file_times(pair.folder)
    changed = sorted(name for name in times.keys() | now.keys() if times.get(name) != now.get(name))
    if changed:
        raise FaultError(f"{changed[0]} was changed while it was verified; run verify again")
    pair.files = found
    return f"{len(found):,} files, {sum(file['num_bytes'] for file in found.values()):,} bytes, with their digests"


def carried_over(pair: Pair) -> str:
    """Compare the files that were copied, and look for those that were written or left out, or are too many.

    Weights, their index, config.json and chat templates are left to the checks that look into them.
    """
    record = pair.manifest.files
    for name in record.carried_over:
        source, target = pair.base_folder / name, pair.folder / name
        if name in pair.base.shards or name in (CONFIG_NAME, INDEX_NAME) or _is_template(name):
            continue
        if not target.is_file():
            raise FaultError(f"{name} was carried over and is missing now")
        if source.is_file() and not same_inode(source, target) \
                and first_difference(Extent.whole(source), Extent.whole(target)) is not None:
            raise FaultError(f"{name} differs from the base")
    for name in record.rewritten:
        if not (pair.folder / name).is_file() and name not in pair.base.shards:
            raise FaultError(f"{name} is missing")
    for name in record.left_out:
        if (pair.folder / name).is_file() and not is_stale(name):  # which another check names
            raise FaultError(f"{name} is in the folder, though it was left out: {record.left_out[name]}")
    others = _others(pair)
    for name in others:
        if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS):
            raise FaultError(f"{name} is no file of this checkpoint, and other readers may load weights from it; "
                             "delete it")
    counts = len(record.carried_over), len(record.rewritten), len(record.left_out)
    also = f"; there are also {', '.join(others[:3])}{', …' * (len(others) > 3)}" if others else ""
    return "{} carried over, {} rewritten, {} left out{}".format(*counts, also)


def _is_template(name: str) -> bool:
    return name == "chat_template.jinja" or name.startswith("additional_chat_templates/")


def _others(pair: Pair) -> list[str]:
    """Return the files beside the model's own that nobody knows about."""
    record = pair.manifest.files
    known = {*record.carried_over, *record.rewritten, *record.left_out, *pair.base.shards, *OUR_FILES}
    return sorted(path.name for path in pair.folder.iterdir()
                  if path.is_file() and path.name not in known and not is_stale(path.name))


def no_stale_tokenizer(pair: Pair) -> str:
    """Look for files from which another reader would make a tokenizer without the new tokens."""
    names = sorted(path.name for path in pair.folder.iterdir() if is_stale(path.name))
    if names:
        raise FaultError(f"from {', '.join(names)} other readers would make a tokenizer without the new tokens; "
                         f"delete {'it' if len(names) == 1 else 'them'}")
    return "tokenizer.json is the only description of the tokenizer"
