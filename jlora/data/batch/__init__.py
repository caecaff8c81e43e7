"""From token ids to batches.

`load_dataset` is the entry of the whole pipeline. `mixing` holds out and repeats
records, `packing` puts several into one row, `batches` makes the arrays of a step, and
`preview` shows the data to a person.
"""
