"""`kdcache build`: runs a teacher over a corpus once and caches its soft targets.

`build` settles what follows from the options (spec, spans), the `Driver` hands out missing spans to
workers (threads of this process, or actors on a Ray cluster), and each `SpanWorker` makes shards.
"""
