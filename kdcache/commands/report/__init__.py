"""`kdcache report`: one page to look at, about caches, runs and sweeps.

`gather` reads what is at a path, `page` puts it into sections, `html` escapes every text, `charts`
draws inline SVG.
"""
