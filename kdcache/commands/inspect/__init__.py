"""`kdcache inspect`."""
