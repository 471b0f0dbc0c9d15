"""The planner: what a finetune will take, told before it starts. Pure arithmetic over the shape of a
model, how it is trained, the lengths of the rows, and the place.

setup      what goes in: `Setup`, `Rows`, `Place`
shape      what a layer keeps and holds
memory     the peak, by cause
choice     what training may choose for itself, to fit
configuration  the shape, read off a model's config.json
constants  what is measured
cost       disk and time
changes    the smallest changes that would fit
plan       all of it, and the verdict
"""

from tuneloop.core.plan.changes import Change, smallest_changes
from tuneloop.core.plan.choice import Choice, choose
from tuneloop.core.plan.configuration import architecture_of
from tuneloop.core.plan.cost import Disk, Rate, Time, weights_on_disk
from tuneloop.core.plan.memory import CAUSES, Cause, Memory, Peak, peak
from tuneloop.core.plan.plan import Plan, Recommendation, place_of_size, plan, recommend, setup_at
from tuneloop.core.plan.setup import Place, Rows, Setup, pack_of, rows_by_characters

__all__ = [
    "CAUSES",
    "Cause",
    "Change",
    "Choice",
    "Disk",
    "Memory",
    "Peak",
    "Place",
    "Plan",
    "Rate",
    "Recommendation",
    "Rows",
    "Setup",
    "Time",
    "architecture_of",
    "choose",
    "pack_of",
    "peak",
    "place_of_size",
    "plan",
    "recommend",
    "rows_by_characters",
    "setup_at",
    "smallest_changes",
    "weights_on_disk",
]
