"""The single checks of `verify`: each is a function from the two checkpoints to what it found.

A check raises `FaultError` when something is wrong, `NotCheckedError` when it could not be made, and
otherwise returns one line for the report. Each looks at what is on the disk, not at what an earlier
stage believed.

    pair.py         the two checkpoints, opened when a check first asks for them
    files.py        which base it is, which files there are
    weights.py      tensors, rows, config, logits
    pipeline.py     the tokenizer, part by part, against the extension made anew from the base
    behaviour.py    what the tokenizer does to text
    adversarial.py  the text that hurts most
"""
