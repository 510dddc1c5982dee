"""The commands: `kdcache NAME` is the function NAME of `NAME/NAME.py`.

Each takes an options value, whose class is in `NAME/options.py`, and returns a JSON-able result,
which the command line prints.
"""
