"""`kdcache demo`: the main job on what every Python carries, in a few minutes on two cores."""
