"""The command line: parses, resolves the configuration, makes one call below, and prints."""
