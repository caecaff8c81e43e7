"""Training: one step, the loop around it, and what makes a run safe to interrupt.

Read `step.py` (the gradient of the adapter, and one optimizer step), then `trainer.py`
(the compiled step of one adapter) and `loop.py` (the life of a run, from resuming to
export). `run.py` is one adapter with its data, log and checkpoints; `sweep.py` trains
several at once. `optimizer.py`, `evaluation.py`, `prefetch.py`, `step_log.py`, `pauses.py`,
`text_samples.py`, `progress.py`, `checkpoint.py` and `resuming.py` each do what they are called.
`memory_estimate.py` says before step 1 what fits, `compiler_options.py` how XLA compiles,
`device_model.py` what a device computes.
"""
