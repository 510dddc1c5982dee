"""The commands: `kdcache NAME` is the function NAME of the module or folder NAME.

Each takes an options value and returns a JSON-able result, which the command line prints.
"""
