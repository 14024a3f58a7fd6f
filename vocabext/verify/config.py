"""config.json, and whether shards, index, config and ids agree."""

from contextlib import suppress
from typing import Any

from vocabext.checkpoint.folder import CONFIG_NAME, read_json
from vocabext.checkpoint.named_ids import named_ids
from vocabext.errors import CheckpointError, TokenizerError
from vocabext.tokenizer import check_rules
from vocabext.verify.pair import FaultError, NotCheckedError, Pair

TIED_KEY = "tie_word_embeddings"
SIZE_KEY = "vocab_size"
UNQUANTISED_KEYS = ("ignore", "modules_to_not_convert")


def shards_complete(pair: Pair) -> str:
    """Read the headers of all shards: each is whole, holds what the index says, and together they hold all tensors."""
    shards = pair.shards
    new = {name for shard in shards.values() for name in shard.tensors}
    old = set(pair.base.tensors)
    missing, unexpected = sorted(old - new), sorted(new - old - pair.manifest.tensors.keys())
    if missing or unexpected:
        raise FaultError("; ".join(f"{what} tensors: {', '.join(names[:3])}{', …' * (len(names) > 3)}" for what, names
                                   in (("missing", missing), ("unexpected", unexpected)) if names))
    return f"{len(shards):,} shard{'s' * (len(shards) != 1)}, {len(new):,} tensors"


def config_agrees(pair: Pair) -> str:
    """Compare config.json with the base's, with the stored rows, and with the ids."""
    try:
        _check_changes(pair, _flat(pair.base.config), _flat(read_json(pair.folder / CONFIG_NAME)))
    except FaultError:
        with suppress(CheckpointError, NotCheckedError):
            _ = pair.new  # if it cannot be opened now, this is why, and no other check need say so
        raise
    new, base = pair.new, pair.base
    last = pair.expansion.end_id - 1
    if last >= new.vocab_size:
        raise FaultError(f"the last new id is {last}, but there are only {new.vocab_size} rows")
    if new.tied != (base.tied and not pair.manifest.untied):
        raise FaultError(f"the head is {'' if new.tied else 'not '}tied to the embedding, in the base it is "
                         f"{'' if base.tied else 'not '}tied{', and was separated here' * pair.manifest.untied}")
    said = ", the head is its own now" if pair.manifest.untied else ""
    return f"{SIZE_KEY} {new.vocab_size:,} (base {base.vocab_size:,}), last id {last:,}{said}"


def _check_changes(pair: Pair, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse every change but that of the number of rows, and of the tie if it was cut on purpose."""
    for key in sorted(old.keys() | new.keys()):
        outer, _, name = key.rpartition(".")
        if old.get(key) == new.get(key) or (outer in ("", "text_config") and name.startswith(SIZE_KEY)):
            continue
        if pair.manifest.untied and _belongs_to_untying(name, old.get(key), new.get(key)):
            continue
        raise FaultError(f"config.json: {key} is {new.get(key)!r}, in the base {old.get(key)!r}")


def _belongs_to_untying(name: str, old: Any, new: Any) -> bool:
    """Tell whether a change only says that the head is its own now, and is not quantised."""
    return (name == TIED_KEY and new is False) or (name in UNQUANTISED_KEYS and new == [*(old or ()), "lm_head"])


def named_ids_kept(pair: Pair) -> str:
    """Look for new tokens with an id that a file names, or that hide what generation stops at or must not write."""
    found = [named_ids(folder) for folder in (pair.base_folder, pair.folder)]
    found.append(pair.base_tokenizer.named)  # which knows the end of text that only the tokenizer names
    first, end = pair.expansion.first_new_id, pair.expansion.end_id
    for named in found:
        for i, where in sorted(named.where.items()):
            if first <= i < end:
                token = pair.expansion.tokens[i - first].token
                raise FaultError(f"{where} names the id {i}, which the new token {token!r} has; expand the base again")
        try:
            check_rules(named.rules, pair.expansion.tokens)
        except TokenizerError as error:
            raise FaultError(str(error)) from None
    behind = len(pair.base_tokenizer.reserved)
    said = f"; {behind} behind the tokenizer's own left free" if behind else ""
    return f"{len(found[0].where):,} ids named, {found[0].rules.count:,} stops and bans{said}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}
