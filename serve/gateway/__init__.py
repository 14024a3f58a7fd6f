"""A gateway in front of vLLM: try the expanded model under live traffic, and go back in one step.

    arms.py        the two arms, base and expanded
    answers.py     JSON errors as OpenAI's clients expect them
    guard.py       limits on headers and body, and the API key
    calls.py       one request as the gateway understands it, and as an engine gets it
    events.py      server-sent events, cut out of bytes as they come
    observe.py     what an answer was: text, length, times; read after it was passed on
    metrics.py     Prometheus
    load.py        how busy the arms are: places for requests, and whose times may be compared
    policy.py      which arm answers which request
    state.py       the policy and its history in one file that survives a restart
    sequential.py  confidence sequences: intervals that hold however often one looks
    canary.py      arms compared while they serve, with a reason to go back
    side_tasks.py  what runs beside the requests
    trial.py       the policy in force and the canary under it; changes it, or rolls back
    upstream.py    calls to vLLM, and every way in which they fail
    chat.py        chat answers from the completions of ids
    logprobs.py    log-probabilities without the new tokens
    front.py       one engine, two tokenizers: base ids in, the base's answers out
    ban.py         runs inside vLLM: a base request cannot be answered with a new token
    engines.py     both arms, and what reaches their engines
    health.py      whether the engines answer, and the ban holds
    reading.py     how likely the expanded model finds the base's answers behind its own reading of the prompts
    record.py      requests, written down where that was asked for
    relay.py       passes one answer on, as it comes
    app.py         puts all this together: one request, one arm, from the first byte to the last
    admin.py       loopback only: swap, roll back, status
    protocol.py    uvicorn's servers, with a limit on headers
    keeper.py      where the arms come from; starts engines again that die
    log.py         the lines of the log: with the time, and not one for each that a client sends
    run.py         starts the engines, the proxy and the admin endpoint
    replay.py      recorded requests, sent again to either arm
    contract.py    what clients rely on, item by item
    rehearsal.py   a rehearsal without users: replays requests, checks the contract  -> swap.json

Requests and answers are never logged, and only written down with `--record`.
"""
