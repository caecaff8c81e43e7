"""Samples of a run: what its model writes after held-out prompts, before and after training."""

from collections.abc import Callable

from jlora.errors import StopRequested, counted, warn
from jlora.lora.adapter_tree import Params
from jlora.report.run_folder import write_generated
from jlora.report.run_report import Report
from jlora.report.trackers import GeneratedText
from jlora.train.pauses import Pauses, duration

Generate = Callable[[Params], list[GeneratedText]]


class TextSamples:
    """Takes samples until that fails: a run does not end for want of them."""

    def __init__(self, generate: Generate | None, pauses: Pauses) -> None:
        """Takes what generates, None for no samples, and what keeps its time apart."""
        self._generate, self._pauses = generate, pauses

    def take(self, report: Report, params: Params, step: int) -> None:
        """Writes what the model says after a step into a run's folder and its trackers."""
        if self._generate is None:
            return
        work = "generating samples"
        before = self._pauses.seconds[work]
        try:
            with self._pauses.spent(work):
                texts = self._generate(params)
        except StopRequested:
            raise
        except Exception as error:  # most likely, the device lacks memory
            said = next(iter(str(error).splitlines()), "")
            warn(f"no samples are generated ({type(error).__name__}: {said})")
            self._generate = None
            return
        took = duration(self._pauses.seconds[work] - before)
        report.say(f"step {step}: {counted(len(texts), 'sample')} generated in {took}")
        write_generated(report.path.parent, step, texts)
        report.tracking.show(texts, step)
