"""The Python API, which the command line calls as well.

expand.py   all stages in one call
model.py    a base model, with a method for each stage, and an expanded one
corpus.py   what may be given as a corpus
results.py  what the stages return: tables that can be saved, loaded and shown
voice.py    where a call reports progress and remarks, and how its messages name options

`import vocabext` offers the public names, and imports these modules when one is first used.
"""
