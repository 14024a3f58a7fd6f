"""What an adapter changes: nothing without it, and how much with it.

Shape suffixes: T positions, V base ids, N new tokens.
"""

from typing import Any

import torch

from vocabext.checkpoint.manifest import ADAPTER_FOLDER
from vocabext.errors import MissingExtraError, UsageError
from vocabext.files.ranges import file_sha256
from vocabext.model.first_pieces import first_piece_logs
from vocabext.model.support import check_loads
from vocabext.verify.pair import FaultError, NotCheckedError, Pair
from vocabext.verify.plain import prompts

MERGED = "an adapter was merged into the weights: the body is not the base's"


def refuse_merged(pair: Pair) -> None:
    """Leave a check out that no body can pass which an adapter was merged into.

    Raises:
        NotCheckedError: If so.
    """
    if pair.manifest.merged:
        raise NotCheckedError(MERGED)


def adapter_drift(pair: Pair, load_weights: bool) -> str:
    """Compare the base with the healed model on text without new tokens; the files of the adapter first.

    Args:
        pair: The checkpoints.
        load_weights: Whether to load them.
    """
    if not pair.manifest.merged:
        for name, digest in pair.manifest.adapter["sha256"].items():
            if file_sha256(pair.folder / name) != digest:
                raise FaultError(f"{name} is not the file that `heal` has written; heal again")
    if not load_weights:
        raise NotCheckedError("loading the weights was switched off")
    texts = [torch.tensor([ids], dtype=torch.long) for ids in prompts(pair).values()]
    check_loads(pair.base_folder, trust_remote_code=pair.trust_remote_code)
    base = [_logits(_load(pair, new=False), ids, pair) for ids in texts]
    model = _load(pair, new=True)
    if not pair.manifest.merged:
        from vocabext.model.adapter import load_adapter

        try:
            load_adapter(model, pair.folder / ADAPTER_FOLDER)
        except MissingExtraError as missing:
            raise NotCheckedError(str(missing)) from None
        except UsageError as error:
            raise FaultError(str(error)) from None
    first_N = torch.tensor([token.run[0] for token in pair.expansion.tokens])
    nats, same, count = 0.0, 0, 0
    for ids, wanted_TV in zip(texts, base, strict=True):
        found_TV = first_piece_logs(_logits(model, ids, pair), first_N)
        logs_TV = torch.log_softmax(wanted_TV[:, : found_TV.shape[1]], 1)
        nats += float(torch.nn.functional.kl_div(found_TV, logs_TV, log_target=True, reduction="sum"))
        same, count = same + int((found_TV.argmax(1) == logs_TV.argmax(1)).sum()), count + len(logs_TV)
    how = "merged" if pair.manifest.merged else "switched on"
    return (f"{how}, it moves text without new tokens by {nats / count:.4f} nats per position; the likeliest piece is "
            f"the base's at {same / count:.1%} of {count} places")


def _load(pair: Pair, *, new: bool) -> Any:
    from vocabext.model.frozen import load_model

    return load_model(pair.folder if new else pair.base_folder, trust_remote_code=pair.trust_remote_code,
                      complete=False, runs=False)


@torch.no_grad()
def _logits(loaded: Any, ids: torch.Tensor, pair: Pair) -> torch.Tensor:
    """Return the logits of the ids in use, (T, V + N); of the base, (T, V)."""
    return loaded.model(ids.to(loaded.device)).logits[0, :, : pair.expansion.end_id].float().cpu()
