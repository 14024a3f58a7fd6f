"""How `vocabext.mine.stage` chooses tokens.

counts.py      the corpus as base ids, cut into units (words, strings of punctuation)
sequences.py   frequent sequences of units, for tokenizers that look whole strings up
merges.py      pairs of tokens, for tokenizers whose new tokens are merges
"""
