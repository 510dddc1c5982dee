"""The command line: options to commands, and everything that prints."""
