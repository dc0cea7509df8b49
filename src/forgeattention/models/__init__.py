"""Everything that reads a model: its name, shape, rotation and weights."""

from .names import Source, convert, fetch, folder, load, load_mlx, resolve, served_name

__all__ = ["Source", "convert", "fetch", "folder", "load", "load_mlx", "resolve", "served_name"]
