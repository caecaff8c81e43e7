"""What people see of a run: progress on the terminal, metrics.jsonl and a plot.

Read `run_report.py` (one run's progress bar and metrics file), `metrics_file.py` (reading
metrics.jsonl back), `plot.py` (report.png) and `samples.py` (data as the model reads it).
"""
