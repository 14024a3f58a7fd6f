"""The single checks of `verify`: each is a function from the two checkpoints to what it found.

A check raises `FaultError` when something is wrong, `NotCheckedError` when it could not be made, and
otherwise returns one line for the report. Each looks at what is on the disk, not at what an earlier
stage believed.

    pair.py         the two checkpoints, opened when a check first asks for them
    files.py        which base it is, which files there are, which are recorded for serving
    config.py       shards, config.json, rows and ids
    tensors.py      the bytes of tensors and rows
    logits.py       what both compute for plain text, in transformers
    engine.py       what both write, in vLLM; greedy.py is the process that asks it
    plain.py        the plain text
    extension.py    the tokenizer, part by part, against the extension made anew from the base
    behaviour.py    what the tokenizer does to text
    sample.py       which texts of the corpus are encoded
    adversarial.py  the text that hurts most
"""
