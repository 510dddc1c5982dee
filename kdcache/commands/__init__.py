"""The commands: `kdcache NAME` is the function NAME of the module or folder NAME.

Each takes an options value and gives a JSON-able result; the command line prints it.
"""
