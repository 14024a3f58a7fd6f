"""The Python API, which the command line calls as well.

model.py    a base model, with a method for each stage; an expanded one; all stages in one call
results.py  what the stages hand on and find: tables that can be saved, loaded and shown
voice.py    how a call reports: progress, remarks, and what messages call an option

`import vocabext` offers the public names, and imports these modules when one is first used.
"""
