"""`python -m kdcache`: the same as the `kdcache` program."""

from kdcache.cli.main import main

if __name__ == "__main__":
    main()
