"""The effective tokenizer of a model, and its extension by tokens that are merges.

*Effective* means: what `AutoTokenizer.from_pretrained` really does with the folder, not what a file
in it says; model classes rebuild parts of the pipeline from their own code.

Extending a BPE tokenizer changes three things and nothing else: the new strings enter the vocabulary,
`ignore_merges` makes BPE look a whole chunk up before it merges anything, and the pre-tokenizer hands
a new string over as one chunk wherever that cannot disturb its neighbours (`boundaries.py` proves
where). No merge is added or removed, and no AddedToken (those match inside longer words).

This package is the only importer of `tokenizers`.
"""

from vocabext.tokenizer.base import BaseTokenizer, ExpandedTokenizer, extend
from vocabext.tokenizer.chain import MergeChain
from vocabext.tokenizer.loading import check_made_for, is_stale, load_expanded, load_tokenizer, save_expanded
from vocabext.tokenizer.scheme import SPACE_MARK, Units

__all__ = ["SPACE_MARK", "BaseTokenizer", "ExpandedTokenizer", "MergeChain", "Units", "check_made_for", "extend",
           "is_stale", "load_expanded", "load_tokenizer", "save_expanded"]  # fmt: skip
