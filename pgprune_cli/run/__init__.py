"""A run directory on disk: every file name, and one module per kind of file."""
