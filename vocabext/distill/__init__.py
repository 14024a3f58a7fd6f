"""Distill one embedding row per new token (Token Distillation, arXiv 2505.20133).

The new row is optimised until the frozen model's hidden states, with the one new token in the text,
match those it had with the original pieces. Only new rows are trained.

    examples.py   snippets as padded arrays, student and teacher aligned
    contexts.py   what the teacher makes of them: states to match, keys and values before the token
    engine.py     the optimisation of a group of tokens, in rounds
    clocks.py     an optimizer per token, and when it stops
    silence.py    what keeps the rows of a tied model from being written in the wrong place
    memory.py     what all this needs, known before it starts
    report.py     what became of each token, and which are left out
    resume.py     finished groups, kept until the output is written
    stage.py      the stage: mean-of-pieces rows, training, the quality gate
"""

from vocabext.distill.input_rows.report import TokenReport
from vocabext.distill.stage import DistillResult, distill, distill_file, make_rows

__all__ = ["DistillResult", "TokenReport", "distill", "distill_file", "make_rows"]
