"""The command line and what it runs. Nothing outside this package imports it."""
