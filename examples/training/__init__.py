"""The parts of ``examples/train_model.py``, one idea per module.

Read them in this order: ``data`` (where the text comes from), ``tokenizer`` (how it becomes
integers), ``ngram`` (the baseline to beat), ``optim`` and ``model`` (how the model learns),
``evaluate`` (how well it learned), ``card`` (what to tell about it).
"""
