"""`kdcache sweep`: many students of the same caches, side by side."""
