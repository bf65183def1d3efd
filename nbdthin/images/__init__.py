"""Container images as files: reading archives, applying layers to a directory, comparing trees, writing OCI layouts.

Nothing here knows of pools: it is directories, files and tar streams.
"""
