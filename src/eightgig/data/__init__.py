"""Facts about the data: rows, their tokens, and which of them are trained.

The way of a row, file by file:

    sources    which files `data.path` names
    read       rows of a file, unparsed (read_json, read_tables; raw: one row before parsing)
    parse      one row as one JSON object
    formats    the conversation or text that it means (turns: its messages)
    template   the model's chat template (tokenizer: where it comes from)
    served     the prompt that a server builds for each answer, and the answer, as texts
    control    control tokens that a person typed are no control tokens
    encode     texts as tokens (words: where they are those of the words)
    layout     rows of tokens that begin with the tokens of the prompt
    render     all of it for one row

    prepare    all rows: chunks of them go through processes (chunks, pool, worker), their tokens to
               files (tokenised, cache)
    load       training and held-out rows (select: some of them, none too long)
    batches    optimizer steps and micro-batches

    checks     what `eightgig check` says (rules: every finding; patterns, texts, near: what texts
               look like; preview: a row for people)
"""
