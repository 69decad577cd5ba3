"""`opdsl serve`: one model answering scoring requests over HTTP.

    jobs      a bounded queue and the one thread that computes
    server    HTTP around it: paths, limits, keys, shutting down
    loading   from the words of the command line to a model ready to score

What a request and an answer look like is `opdsl.train.teachers.wire`; how they are computed is
`opdsl.train.teachers.scorer`.
"""
