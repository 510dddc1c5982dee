"""`kdcache generate`: a model writes answers to the prompts of a corpus, which becomes a corpus."""
