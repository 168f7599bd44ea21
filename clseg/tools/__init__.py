"""The command line and what it offers beside studies: check, predict, export."""
