"""From paths to records, before any tokenizer is involved.

`data_paths` finds the files, `row_files` (with `pyarrow_files`) reads their rows, `jsonl`
parses JSON lines, and `records` validates a row by its format.
"""
