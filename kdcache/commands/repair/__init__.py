"""`kdcache repair`."""
