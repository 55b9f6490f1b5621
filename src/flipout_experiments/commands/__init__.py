"""The command line: options, progress and printing."""
