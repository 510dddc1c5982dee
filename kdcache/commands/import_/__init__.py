"""`kdcache import`. Python has the word for itself: folder and function end in `_`."""
