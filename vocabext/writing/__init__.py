"""Output rows: make the model write new tokens where it would have written their pieces.

runs.py      the runs of all new tokens as one tree
places.py    what the base would write at every place of some text
fit.py       the fit of all output rows together, on the base's frozen states
rows.py      from snippets to output rows: held-out choice, silent rows, a report for each token
measure.py   adoption, wrong use and what base targets lose, at places
decode.py    free greedy writing: characters per step
"""
