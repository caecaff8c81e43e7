"""Kills and damage at random: what comes out is the right result, or a refusal.

`lab` has the small model and the table of outcomes, `kills` ends processes by SIGKILL,
`damage` changes files. `__main__` is the long form (`make chaos`), `test_chaos` the short one.
"""
