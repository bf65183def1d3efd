"""Data into a pool, out of it, and from one pool to another. All of it asks a daemon, and works from Python as well."""
