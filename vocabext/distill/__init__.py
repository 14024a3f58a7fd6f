"""Distill one embedding row per new token (Token Distillation, arXiv 2505.20133).

The new row is optimised until the frozen model's hidden states, with the one new token in the text,
match those it had with the original pieces. Only new rows are trained.

    examples.py   snippets as padded arrays, student and teacher aligned
    engine.py     the optimisation
    silence.py    what keeps the rows of a tied model from being written in the wrong place
    stage.py      the stage: mean-of-pieces rows, training, the quality gate
"""

from vocabext.distill.stage import DistillResult, TokenReport, distill, distill_file

__all__ = ["DistillResult", "TokenReport", "distill", "distill_file"]
