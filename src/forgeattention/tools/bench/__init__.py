"""`forgeattn bench`."""
