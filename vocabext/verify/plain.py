"""Plain text that is unlikely to hold new tokens: both checkpoints must do exactly the same with it."""

from vocabext.verify.pair import NotCheckedError, Pair

PROMPT_TOKENS = 64
PLAIN_TEXTS = ("The quick brown fox jumps over the lazy dog.", "1, 2, 3; (a) [b] {c}", "In the beginning",
               "    return x + 1\n", "¿Qué tal? Ça va. Привет, 世界!", "A list of things:\n- one\n- two")


def prompts(pair: Pair) -> dict[str, list[int]]:
    """Return the ids of the plain texts that hold no new token, as prompts.

    Args:
        pair: The checkpoints.

    Raises:
        NotCheckedError: If there is none.
    """
    found = {}
    for text in PLAIN_TEXTS:
        ids = pair.base_tokenizer.encode(text)
        framed = [*pair.base_tokenizer.prefix_ids, *ids][:PROMPT_TOKENS]
        if framed and pair.new_tokenizer.encode(text) == ids:
            found[text] = framed
    if not found:
        raise NotCheckedError("all plain test sentences contain new tokens")
    return found
