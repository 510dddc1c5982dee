"""`kdcache build`: runs a teacher over a corpus once and caches its soft targets.

`build` derives spec and spans from the options, the `Driver` hands out missing spans to workers
(threads of this process, or actors on a Ray cluster), and each `SpanWorker` makes shards.
"""
