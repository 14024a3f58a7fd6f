"""Serve a base and an expanded model with vLLM, measure both on the same text, and report.

    engine.py      a vLLM server as a child process: start, wait until healthy, always stop
    lengths.py     how much shorter a corpus becomes                  -> lengths.json
    predict.py     what that should bring on a device, from a roofline -> predict.json
    model.py       what serving asks of a model folder
    provenance.py  what was measured on: versions, hardware
    bench/         base and expanded in turn, under the same texts    -> bench.json
    report/        all results on one page, never measures            -> report.html
    gateway/       both behind one endpoint: try, compare, go back

Installed, and in every import, this folder is `vocabext.serve` (vocabext/serve is a link to it). It may import
`vocabext`'s lower floors; `vocabext` never imports this package, except for the lazily loaded `vocabext serve`.
"""

if __name__ != "vocabext.serve":
    raise ImportError(f"this package was imported as {__name__}; import vocabext.serve, or there would be two of it")
