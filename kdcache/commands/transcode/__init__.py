"""`kdcache transcode`."""
