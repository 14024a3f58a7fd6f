"""The effective tokenizer of a model, and its extension by tokens that are merges.

*Effective* means what `AutoTokenizer.from_pretrained` makes of the folder, not what a file in it says: model classes
rebuild parts of the pipeline from their own code.

There are three ways to make a new token in BPE, and none touches other text:

- A merge behind all merges of the base makes it, where BPE sees a whole text or a whole run of letters without
  spaces (`merges.py`). Its parts must be tokens.
- `ignore_merges` looks it up, where a regex splits the text into chunks: it finds a chunk that is an entry before
  BPE merges anything. An alternative in that regex makes a chunk of a phrase (`chunks.py`).
- A splitting step cuts it out where `boundaries.py` proves that no merge could cross its edges, and `ignore_merges`
  looks it up: for tokens that should be merges and lack parts (`whole_text.py`, `inner.py`).

Unigram has its own way (`unigram/`). No extension changes a merge of the base, or makes an AddedToken (those match
inside longer words).

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
