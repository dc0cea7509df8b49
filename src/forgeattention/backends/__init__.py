"""Launchers of the kernels, called by `ops` with checked arguments: a package per backend.

Each package has a function per op. Its `__init__` says in `OPS` which module of this package launches which op, and in
`MLX_OPS` which one does for MLX arrays. A backend cannot run an op that its table lacks. A module is imported when one
of its ops is first called.
"""
