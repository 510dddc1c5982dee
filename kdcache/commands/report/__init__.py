"""`kdcache report`: one page to look at, about caches, runs and sweeps.

`gather` reads what is at a path, `sections` makes blocks of it, `charts` computes curves, and
`page.html.jinja` draws them.
"""
