"""Token ids on disk, made once by all cores and reused by later runs.

`build_cache` is the entry, `token_store` the file format, and `row_counts` what is
reported about the rows of each source.
"""
