"""What holds for an expanded tokenizer and its base, and texts on which it is checked."""

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
from hard_texts import ALL_WANTED, FRAGMENTS, possible
from hypothesis import strategies as st
from tiny_tokenizers import family_base
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend


@cache
def expanded(name: str) -> ExpandedTokenizer:
    base = family_base(name)
    return extend(base, possible(base))


def check_ids(base: BaseTokenizer, new: ExpandedTokenizer, text: str) -> None:
    """The same base ids, never more of them, and the same text back."""
    found, wanted = new.encode(text), base.encode(text)
    assert new.expansion.unmerge(found).tolist() == wanted
    assert len(found) <= len(wanted)
    assert new.decode(found) == base.decode(wanted)
    assert new.backend.decode(found) == base.backend.decode(wanted), "without special tokens"


def check_offsets(base: BaseTokenizer, new: ExpandedTokenizer, text: str) -> None:
    """A new token spans exactly what its pieces span, before spaces are trimmed off."""
    found, wanted = (t.untrimmed.encode(text, add_special_tokens=False) for t in (new, base))
    known = {base.scheme.key_text(key) for key in base.vocabulary}
    if getattr(base.scheme, "drops_unknown", False) and set(text) - known:
        # The library counts tokens, not text: the base's own offsets are wrong behind a character that vanished.
        assert found.offsets == sorted(found.offsets)
        return
    ends = np.cumsum(new.expansion.run_lengths(found.ids))
    spans = [wanted.offsets[start:end] for start, end in itertools.pairwise([0, *ends.tolist()])]
    whole = [(min(s for s, _ in span), max(e for _, e in span)) for span in spans]
    assert found.offsets == whole


def streamed(backend: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text that a server sends, token by token."""
    stream = decoders.DecodeStream(skip_special_tokens=skip_special_tokens)
    return "".join(stream.step(backend, i) or "" for i in ids)


def check_streaming(base: BaseTokenizer, new: ExpandedTokenizer, text: str) -> None:
    for skip in (False, True):
        found = streamed(new.backend, new.encode(text), skip_special_tokens=skip)
        assert found == streamed(base.backend, base.encode(text), skip_special_tokens=skip)
        whole = new.backend.decode(new.encode(text), skip_special_tokens=skip)
        if not whole.endswith("\ufffd"):  # a stream waits for the rest of a broken character
            assert found == whole


def check_prompts(base: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, tokens: ExpandedTokenizer,
                  text: str) -> None:
    """Frames and chat templates; both tokenizers as transformers wraps them."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} "}]
    for generation in (False, True):
        found, wanted = (hf.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
                         for hf in (new, base))
        assert tokens.expansion.unmerge(found).tolist() == wanted
    assert tokens.expansion.unmerge(new(text)["input_ids"]).tolist() == base(text)["input_ids"]
    assert tokens.expansion.unmerge(new(text, text)["input_ids"]).tolist() == base(text, text)["input_ids"]
    for skip in (False, True):
        assert (new.decode(new.encode(text), skip_special_tokens=skip)
                == base.decode(base.encode(text), skip_special_tokens=skip))


PLANES = st.characters(exclude_categories=["Cs"])
CONTROLS = st.characters(categories=["Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"])
LONG = st.builds(lambda text, times: text * times, st.sampled_from([*FRAGMENTS, "a", "Ж", "语", "aé"]),
                 st.integers(2, 60))
PARTS = st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(ALL_WANTED), st.text(PLANES, max_size=5),
                  st.text(CONTROLS, max_size=4), LONG)


@cache
def texts(name: str) -> st.SearchStrategy[str]:
    """Texts that hurt, with the special tokens of a family in them."""
    special = sorted(family_base(name).added)
    parts = st.one_of(PARTS, st.sampled_from([*special, *(s[:-1] for s in special), *(f" {s} " for s in special)]))
    return st.lists(parts, max_size=10).map("".join)




@cache
def chained(name: str) -> ExpandedTokenizer:
    """All that people want, with the parts that it is merged from: all beginnings of its runs."""
    base = family_base(name)
    chain, tokens = base.scheme.chain(), {}
    for token in possible(base):
        spellings = [base.scheme.spelling(token.run[:end]) for end in range(2, len(token.run) + 1)]
        texts = [base.scheme.key_text(spelling.decode(errors="replace")) for spelling in spellings]
        for part in possible(base, [*token.token, *texts]):
            if part.run not in tokens and chain.add(part):
                tokens[part.run] = part
    return extend(base, list(tokens.values()))
