"""Unigram tokenizers and their extension."""
