"""What the two tokenizers do to text: ids, decoding, offsets, prompts."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream

from vocabext.corpus import Document, Documents
from vocabext.tokenizer import SPACE_MARK, BaseTokenizer, ExpandedTokenizer, encode_with_places
from vocabext.tokens import Ids
from vocabext.verify.pair import FaultError, NotCheckedError, Pair
from vocabext.verify.plain import PLAIN_TEXTS
from vocabext.verify.sample import Reading, batches, texts_of

BATCH = 512
SHOWN = 80  # characters of a text in a message
STREAMED, RANDOM_ROWS, RANDOM_LENGTH = 2_000, 4_000, 6
Place = tuple[int, int]  # where a token begins and ends in its text
BEFORE, AFTER = ("", "x", "x ", ". ", "\n", "("), ("", " ", " y", ".", ",", "\n", ")")


def old_ids(pair: Pair) -> str:
    """Compare the ids of all tokens, and which of them are special."""
    old, new = pair.base_tokenizer.hf, pair.new_tokenizer.hf
    before, after = old.get_vocab(), new.get_vocab()
    for token, i in before.items():
        if after.get(token) != i:
            raise FaultError(f"{token!r} had the id {i} and has {after.get(token)} now")
    expected = {t.key: pair.expansion.first_new_id + i for i, t in enumerate(pair.expansion.tokens)}
    extra = {t: i for t, i in after.items() if t not in before and t}  # nothing at all stands in the holes of Unigram
    if extra != expected:
        odd = sorted(set(extra.items()) ^ set(expected.items()))[0]
        raise FaultError(f"the new tokens are not those of vocabext.json, for example {odd}")
    for name, value in old.special_tokens_map.items():
        if new.special_tokens_map.get(name) != value:
            raise FaultError(f"{name} is {new.special_tokens_map.get(name)!r}, in the base {value!r}")
    if pair.base_tokenizer.prefix_ids != pair.new_tokenizer.prefix_ids:
        raise FaultError(f"prompts begin with {pair.new_tokenizer.prefix_ids}, in the base with "
                         f"{pair.base_tokenizer.prefix_ids}")
    return f"{len(before):,} ids, {len(pair.base_tokenizer.added)} added tokens, {len(expected):,} new"


def new_tokens(pair: Pair) -> str:
    """Find a text that produces each new token, and compare how it reads with how its pieces read."""
    base, new, first = pair.base_tokenizer, pair.new_tokenizer, pair.expansion.first_new_id
    contexts = list(itertools.product(BEFORE, AFTER))
    missing = {i: t for i, t in enumerate(pair.expansion.tokens) if first + i not in pair.seen}
    for before, after in contexts if missing else ():
        wanted = list(missing.items())
        found = new.encode_batch([before + t.token + after for _, t in wanted])
        for (index, _), ids in zip(wanted, found, strict=True):
            if first + index in ids:
                del missing[index]
        if not missing:
            break
    if missing:
        raise FaultError(f"{len(missing)} tokens are produced neither in the texts nor in {len(contexts)} contexts, "
                         f"for example {next(iter(missing.values())).token!r}")
    for index, token in enumerate(pair.expansion.tokens):
        alone, pieces = new.decode([first + index]), base.decode(token.run)
        if alone != pieces:
            raise FaultError(f"the token {token.token!r} reads {alone!r}, its pieces read {pieces!r}")
    return f"{pair.expansion.num_new:,} tokens"


def invariant_on_corpus(pair: Pair, documents: Iterable[Document] | None, *, limit: int | None) -> str:
    """Encode the documents once with each tokenizer.

    Args:
        pair: The checkpoints; `reading` gets how much of the corpus was encoded.
        documents: The corpus; None if there is none.
        limit: A larger corpus is sampled: how many bytes are encoded; None encodes all.
    """
    if documents is None:
        raise NotCheckedError("no --corpus was given")
    pair.reading = reading = Reading()
    new, total = 0, 0
    for batch in batches(texts_of(documents, reading, limit=limit, seed=pair.seed), BATCH):
        for _, _, new_ids in _compared(pair, batch):
            new += int(pair.expansion.is_new(new_ids).sum())
            total += len(new_ids)
    left_out = documents.left_out.describe() if isinstance(documents, Documents) else ""
    return f"{reading.describe()}, {new / max(1, total):.1%} of their tokens new" + (
        f"; not read: {left_out}" if left_out else "")


def invariant_on_adversarial(pair: Pair, count: int) -> str:
    """Encode and decode generated texts with both tokenizers."""
    new = 0
    for batch in batches(pair.adversary.texts(count, pair.seed), BATCH):
        for text, base_ids, new_ids in _compared(pair, batch):
            found, wanted = pair.new_tokenizer.decode(new_ids), pair.base_tokenizer.decode(base_ids)
            if found != wanted:
                raise FaultError(f"{_short(text)} decodes to {_short(found)}, in the base to {_short(wanted)}")
            new += int(pair.expansion.is_new(new_ids).sum())
    return f"{count:,} texts with {new:,} new tokens, none changed"


def _compared(pair: Pair, texts: Sequence[str]) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield texts with their base and expanded ids, once the second were seen to unmerge to the first."""
    base_rows, new_rows = pair.base_tokenizer.encode_batch(texts), pair.new_tokenizer.encode_batch(texts)
    pair.seen.update(*new_rows)
    for text, base_ids, new_ids, back in zip(texts, base_rows, new_rows, _unmerged(pair, new_rows), strict=True):
        if len(back) != len(base_ids) or not np.array_equal(back, base_ids):
            at = next((i for i, (a, b) in enumerate(zip(back, base_ids, strict=False)) if a != b), 0)
            near = pair.base_tokenizer.decode(base_ids[max(0, at - 5) : at + 5])
            was, now = base_ids[at : at + 5], back[at : at + 5].tolist()
            raise FaultError(f"the invariant fails near {_short(near)}: base ids {was} became {now}")
        yield text, base_ids, new_ids


def _unmerged(pair: Pair, rows: Sequence[list[int]]) -> list[Ids]:
    """Unmerge what the expanded tokenizer gave; ids that vocabext.json does not know are a fault."""
    end = pair.expansion.end_id
    beyond = next((i for ids in rows for i in ids if i >= end), None)
    if beyond is not None:
        token = pair.new_tokenizer.decode([beyond])
        raise FaultError(f"the tokenizer gives the id {beyond} ({_short(token)}), but {end - 1} is the last new token")
    return pair.expansion.unmerge_batch(rows)


def streaming_and_offsets(pair: Pair) -> str:
    """Decode token by token, decode ids as a model may write them, and compare places in the text.

    A new token must stand where its run stood: from the beginning of the first piece to the end of the last.
    """
    spec = pair.base_tokenizer.scheme.spec
    drops = getattr(pair.base_tokenizer.scheme, "drops_unknown", False)
    kept = set(pair.adversary.entries) if drops else None
    # Where a mark is put in front of each word, a place holds its space or does not.
    loose = spec["model"]["type"] != "BPE"
    trims = "'trim_offsets': True" in str(spec["post_processor"])
    encoders = [t.untrimmed if trims else t.backend for t in (pair.base_tokenizer, pair.new_tokenizer)]
    for batch in batches(pair.adversary.texts(STREAMED, pair.seed + 1), BATCH):
        befores, afters = (encode_with_places(encoder, batch) for encoder in encoders)
        backs = _unmerged(pair, [after.ids for after in afters])
        for text, before, after, back in zip(batch, befores, afters, backs, strict=True):
            # Behind a character that the model drops, the library gives wrong places, for the base too.
            if len(back) == len(before.ids) and (kept is None or kept.issuperset(text)):
                _check_offsets(text, before, after, pair.expansion.edges(after.ids).tolist(), loose=loose)
            _check_stream(pair, text, before.ids, after.ids)
    return f"{STREAMED:,} texts, {_check_random_ids(pair):,} sequences of any ids"


def _check_offsets(text: str, before: Any, after: Any, edges: list[int], *, loose: bool) -> None:
    """Compare the place of each token with the place of its run.

    Args:
        text: The text.
        before: Its encoding by the base.
        after: Its encoding by the expanded tokenizer.
        edges: Which of the pieces each token stands for.
        loose: Whether spaces at the ends of a place do not count.
    """
    for i, (found, first, end) in enumerate(zip(after.offsets, edges, edges[1:], strict=False)):
        pieces = before.offsets[first:end]
        wanted = min(start for start, _ in pieces), max(stop for _, stop in pieces)
        if found == wanted or (loose and _same_but_spaces(found, wanted, text, after.tokens[i])):
            continue
        raise FaultError(f"token {i} of {_short(text)} stands at {found}, its pieces at {wanted}")


def _same_but_spaces(found: Place, wanted: Place, text: str, token: str) -> bool:
    return not token.strip(SPACE_MARK) or _trimmed(found, text) == _trimmed(wanted, text)


def _trimmed(place: Place, text: str) -> Place:
    inside = text[slice(*place)]
    start = place[0] + len(inside) - len(inside.lstrip())
    return (start, start + len(inside.strip())) if inside.strip() else (0, 0)


def _check_stream(pair: Pair, text: str, base_ids: list[int], new_ids: list[int]) -> None:
    streamed, whole = _stream(pair.new_tokenizer, new_ids), pair.new_tokenizer.decode(new_ids)
    # Some decoders cannot be streamed; then the base cannot either.
    if streamed != whole and _stream(pair.base_tokenizer, base_ids) == pair.base_tokenizer.decode(base_ids):
        raise FaultError(f"token by token {_short(text)} reads {_short(streamed)}, as a whole {_short(whole)}")


def _stream(tokenizer: BaseTokenizer | ExpandedTokenizer, ids: Sequence[int]) -> str:
    """Decode token by token, as a server does; ends where the library gives up."""
    stream, parts = DecodeStream(skip_special_tokens=False), []
    try:
        for token_id in ids:
            parts.append(stream.step(tokenizer.backend, token_id) or "")
    except Exception as error:  # the library has no other kind
        parts.append(f" ({error})")
    return "".join(parts)


def _check_random_ids(pair: Pair) -> int:
    """Decode what a model may write though no text encodes to it; returns how many sequences were compared.

    Bytes that make no character are left out: a piece that is a byte may join them, the new token does not.
    """
    rng = np.random.default_rng(pair.seed)
    known = np.asarray(sorted({*pair.base_tokenizer.vocabulary.values(), *pair.base_tokenizer.added.values()}))
    shape = RANDOM_ROWS, RANDOM_LENGTH
    new = rng.integers(pair.expansion.first_new_id, pair.expansion.end_id, shape)
    rows = np.where(rng.random(shape) < 1 / 3, new, rng.choice(known, shape))
    compared = 0
    for ids, back in zip(rows.tolist(), pair.expansion.unmerge_batch(list(rows)), strict=True):
        found, wanted = pair.new_tokenizer.decode(ids), pair.base_tokenizer.decode(back.tolist())
        if found != wanted and "\ufffd" not in wanted:
            raise FaultError(f"the ids {ids} decode to {_short(found)}, their pieces to {_short(wanted)}")
        compared += "\ufffd" not in wanted
    return compared


def prompts_as_in_base(pair: Pair) -> str:
    """Call both tokenizers as a user does: with special tokens, and through the chat template."""
    base, new = pair.base_tokenizer.hf, pair.new_tokenizer.hf
    if base.chat_template != new.chat_template:
        raise FaultError("the chat template differs from the base")
    texts = [*PLAIN_TEXTS, *(token.token for token in pair.expansion.tokens[:10])]
    chats = [chat for text in texts[:2] if (chat := _chat(base, text)) is not None]
    found, wanted = ([list(hf(text)["input_ids"]) for text in (*texts, *chats)] for hf in (new, base))
    for text, ids, back, base_ids in zip((*texts, *chats), found, _unmerged(pair, found), wanted, strict=True):
        if back.tolist() != base_ids:
            raise FaultError(f"the prompt {_short(text)} becomes {ids}, in the base {base_ids}")
    for text, chat in zip(texts, chats, strict=False):
        if (written := str(_chat(new, text))) != chat:
            raise FaultError(f"the chat template writes {_short(written)}, in the base {_short(chat)}")
    return f"{len(texts)} prompts, {len(chats)} chats"


def _chat(hf: Any, text: str) -> str | None:
    """Return what the chat template makes of one question; None if there is no template, or it wants more."""
    if not hf.chat_template:
        return None
    try:
        return str(hf.apply_chat_template([{"role": "user", "content": text}], tokenize=False))
    except Exception:  # templates raise what they like; both tokenizers have the same one
        return None


def _short(text: str) -> str:
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"
