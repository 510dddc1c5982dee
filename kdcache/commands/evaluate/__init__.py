"""`kdcache evaluate`."""
