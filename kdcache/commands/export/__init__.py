"""`kdcache export`."""
