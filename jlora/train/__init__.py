"""Training: one step, the loop around it, and what makes a run safe to interrupt.

Read `step.py` (the gradient of the adapter, and one optimizer step), then `trainer.py`
(the compiled step of one adapter) and `loop.py` (the life of a run, from resuming to
export). `run.py` is one adapter with its data, log and checkpoints; `sweep.py` trains
several at once. `optimizer.py`, `adam_8bit.py`, `evaluation.py`, `prefetch.py`,
`step_log.py`, `pauses.py`, `text_samples.py`, `progress.py`, `checkpoint.py` and
`resuming.py` each do what they are called.
Before step 1 `memory_estimate.py` and `cpu_memory.py` say what fits, `step_time_model.py` how
fast it is, `planning.py` and `plan_lines.py` what `--plan` and `--mesh auto` make of it.
`compiler_options.py` is how XLA compiles, `device_model.py` what a device computes.
"""
