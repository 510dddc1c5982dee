"""`kdcache verify`."""
