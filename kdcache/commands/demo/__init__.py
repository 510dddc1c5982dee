"""`kdcache demo`: the whole job on text that every Python carries, in minutes on two cores."""
