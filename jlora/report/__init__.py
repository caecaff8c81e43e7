"""What people see of a run: progress on the terminal, metrics.jsonl and report.html.

Read `run_report.py` (one run's progress bar and metrics file), `metrics_file.py` (reading
metrics.jsonl back), `run_folder.py` (all that a run folder says), `charts.py`, `ranking.py`
and `html_report.py` (the page, by the template `report_page.html`), `samples.py` (data
as the model reads it), `trackers.py` (wandb, TensorBoard, trackio) and `tracking.py` (how a
run uses them).
"""
