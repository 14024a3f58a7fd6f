"""How `vocabext.mine.stage` chooses tokens.

corpus.py   the corpus as base ids, cut into units (words, runs of punctuation)
runs.py     frequent runs of units, for tokenizers that look whole strings up
merges.py   pairs of tokens, for tokenizers whose new tokens are merges
"""
