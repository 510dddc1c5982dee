"""Launcher for a checkout and for `ray job submit -- python cli.py build …`."""

from kdcache.cli.main import main

if __name__ == "__main__":
    main()
