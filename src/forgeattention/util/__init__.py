"""Small things that know nothing of caches: folders, files, sizes, the environment."""
