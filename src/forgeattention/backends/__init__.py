"""Launchers: one module per backend with a function per op, called by `ops` with checked arguments."""
