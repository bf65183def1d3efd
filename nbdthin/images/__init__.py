"""Container images and containers.

As files, in `config`, `archive`, `unpack`, `changes`, `layout`: reading archives, applying layers to a directory,
comparing trees, writing OCI layouts; these know of no pool. As names of a pool, in `store`, `base`, `loading`,
`committing`, `saving`, `containers`.
"""
