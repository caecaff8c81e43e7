"""What a run remembers besides its state.

Every checkpoint keeps it, so that a resumed run logs, and chooses its best step, as one
that was never interrupted.
"""

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """The past of a run, as plain numbers.

    Attributes:
        mean_loss: of the steps since the last line of the log, by supervised tokens; steps
            without a finite loss are left out.
        supervised_tokens: of these steps.
        initial_eval_loss: before the first step, if it was evaluated.
        best_eval_loss: the lowest after any step; None before the first finite one.
        best_step: where it was found.
        evaluations_since_best: how many came after it.
    """

    mean_loss: float = 0.0
    supervised_tokens: int = 0
    initial_eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0

    @property
    def figures(self) -> dict[str, float]:
        """Figures of the evaluations so far, by their names here."""
        names = ("initial_eval_loss", "best_eval_loss", "best_step")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def add_loss(self, loss: float, supervised_tokens: int) -> None:
        """Takes a step into the mean."""
        if math.isfinite(loss) and supervised_tokens:
            self.supervised_tokens += supervised_tokens
            # In this form the mean of one step is its loss, bit for bit.
            share = supervised_tokens / self.supervised_tokens
            self.mean_loss += (loss - self.mean_loss) * share

    def take_mean_loss(self) -> float:
        """Returns the mean, NaN without a step in it, and begins a new one."""
        mean = self.mean_loss if self.supervised_tokens else math.nan
        self.mean_loss, self.supervised_tokens = 0.0, 0
        return mean

    def add_evaluation(self, step: int, eval_loss: float) -> bool:
        """Takes an evaluation; returns whether it is the best after any step so far."""
        if not step:
            self.initial_eval_loss = eval_loss
            return False
        best = math.inf if self.best_eval_loss is None else self.best_eval_loss
        if not eval_loss < best:  # NaN is never the best
            self.evaluations_since_best += 1
            return False
        self.best_eval_loss, self.best_step = eval_loss, step
        self.evaluations_since_best = 0
        return True
