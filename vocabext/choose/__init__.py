"""`choose`: which of the mined tokens are worth what they cost.

text.py       text kept back from mining, cut into windows that stay the same whichever tokens are there
cost.py       what the model loses where it reads new tokens, and which token it owes that to
selection.py  the set that saves most for what it costs; tokens change each other's savings
stage.py      the stage: costs, the choice, the curve of savings against loss, the artifacts
"""
