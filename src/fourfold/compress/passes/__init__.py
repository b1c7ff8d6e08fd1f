"""One pass a file; its module's name, with `-` for `_`, is its name in a recipe."""
