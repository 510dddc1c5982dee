"""`kdcache predict`."""
