"""`kdcache finetune`: an encoder becomes the teacher of a classifier."""
