"""The commands: `kdcache NAME` is the function NAME of `NAME.py` or `NAME/NAME.py`.

Each takes an options value, whose class is in `options.py` here or in its folder, and returns a
JSON-able result, which the command line prints.
"""
