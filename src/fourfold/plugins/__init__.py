"""Fourfold's kernels inside other people's engines: one file for each engine, found by its entry points."""
