"""`kdcache sweep`: trains many students of the same caches and compares them."""
