"""The command line: words to commands, and everything that prints."""
