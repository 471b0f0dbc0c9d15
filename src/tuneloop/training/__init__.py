"""Training, behind a seam: `train(model, inputs, events)`. Knows no step, no job and no folder but those it
is given.

In: a model ready to be trained (what requires a gradient is trained), a dataset folder, the component's
parameters, a folder for checkpoints and those of earlier attempts. Out: the model holds the weights to
keep, events have told of progress and curves, and the result says what was done. `ENGINE` names the
arithmetic: it is written into every result and checkpoint, and rises when losses of equal runs change.
Another engine takes the same and gives the same.

Run `python -m tuneloop.steps DIR` with a finetune step. Nothing here may import steps, lm, engines or what
is above.
"""

from tuneloop.training.loop import ENGINE, prepare, train
from tuneloop.training.plan import Machine, Plan, plan
from tuneloop.training.seam import Events, TrainingInputs, TrainingResult

__all__ = [
    "ENGINE",
    "Events",
    "Machine",
    "Plan",
    "TrainingInputs",
    "TrainingResult",
    "plan",
    "prepare",
    "train",
]
