"""`kdcache gc`."""
