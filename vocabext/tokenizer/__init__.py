"""The effective tokenizer of a model, and its extension by tokens that are merges.

*Effective* means: what `AutoTokenizer.from_pretrained` really does with the folder, not what a file
in it says; model classes rebuild parts of the pipeline from their own code.

A new token is made in one of three ways, none of which can touch other text:

- It is a merge behind all merges of the base, wherever BPE sees a whole text or a whole run of letters without
  spaces (`merges.py`). This needs its parts among the tokens.
- It is looked up: where a regex has split the text into chunks, `ignore_merges` finds a chunk that is an entry
  before anything is merged. A phrase of several chunks becomes one by an alternative in that regex (`chunks.py`).
- It is cut out where `boundaries.py` proves that no merge could cross its edges, and then looked up: what
  lacks parts where it would have to be a merge (`whole_text.py`, `inner.py`).

Unigram has its own way (`unigram.py`). No merge of the base is touched, and no AddedToken is made (those match inside
longer words).

This package is the only importer of `tokenizers`.
"""

from vocabext.tokenizer.base import BaseTokenizer, ExpandedTokenizer, check_rules, extend, given_rows
from vocabext.tokenizer.loading import (
    check_made_for,
    is_stale,
    load_base,
    load_base_of,
    load_expanded,
    load_hf_tokenizer,
    load_tokenizer,
    save_expanded,
)
from vocabext.tokenizer.merges import MergeChain
from vocabext.tokenizer.panics import encode_with_places, encoding
from vocabext.tokenizer.scheme import SPACE_MARK

__all__ = ["SPACE_MARK", "BaseTokenizer", "ExpandedTokenizer", "MergeChain", "check_made_for",
           "check_rules", "encode_with_places", "encoding", "extend", "given_rows", "is_stale", "load_base",
           "load_base_of", "load_expanded", "load_hf_tokenizer", "load_tokenizer", "save_expanded"]
