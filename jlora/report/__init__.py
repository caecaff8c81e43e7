"""What a run shows: its plan, samples of its data, and the report of its metrics.

All of it is in `run_report`.
"""
