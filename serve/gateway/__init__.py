"""A gateway in front of vLLM: try the expanded model under live traffic, and go back in one step.

    arms.py        the two arms, base and expanded, and what is known of them
    policy.py      which arm answers which request
    state.py       the policy and its history in one file that survives a restart
    answers.py     JSON errors as OpenAI's clients expect them
    guard.py       limits on headers and body, and the API key
    upstream.py    calls to vLLM, and every way in which they fail
    events.py      server-sent events, cut out of bytes as they come
    observe.py     what an answer was: text, length, times; read after it was passed on
    load.py        how busy the arms are: whose times may be compared
    app.py         the proxy: one request, one arm, from the first byte to the last
    front.py       one engine, two tokenizers: base ids in, the base's answers out
    chat.py        chat answers from the completions of ids
    ban.py         runs inside vLLM: a base request cannot be answered with a new token
    sequential.py  confidence sequences: intervals that hold however often one looks
    reading.py     how likely the expanded model finds the base's answers behind its own reading of the prompts
    canary.py      arms compared while they serve; rolls back by itself, with a reason
    metrics.py     Prometheus
    admin.py       loopback only: swap, roll back, status
    run.py         starts the engines, the proxy and the admin endpoint
    swap_test.py   a rehearsal without users: the contract that clients rely on  -> swap.json
    page.py        swap.json as a part of the report

Requests and answers are never logged, and only written down with `--record`.
"""
