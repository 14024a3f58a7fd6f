"""Serve a base and an expanded model with vLLM, measure both on the same text, and report.

    engine.py      a vLLM server as a child process: start, wait until healthy, always stop
    client.py      vLLM's own benchmark client, in a process of its own
    compare.py     paired ratios, bootstrap intervals, the noise floor, the verdict
    bench.py       base and expanded in turn, under the same texts  -> bench.json
    lengths.py     how much shorter a corpus becomes                 -> lengths.json
    provenance.py  what was measured on: versions, hardware
    pictures.py    SVG from numbers
    report.py      all results on one page, never measures           -> report.html

May import `vocabext` (its lower floors); `vocabext` never imports this package, except for the
lazily loaded `vocabext serve`.
"""
