"""`kdcache env`."""
