"""One run of Tuneloop's own engine, called as the finetune step calls it; started by `train_speed.py`.

Everything is at its default but for what the comparison fixes. No checkpoints in between: the peers write
none either.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from train_speed_clock import Clock, Task, arguments

from tuneloop import lm, training
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training.course import epoch_order

SEED = 0


class Watch:
    """The events of a run: the clock stops at each logged step."""

    def __init__(self, clock: Clock, profiler: Any = None) -> None:
        self._clock, self._profiler = clock, profiler

    def progress(self, *said: Any, **values: Any) -> None:
        pass

    def metrics(self, step: int, **values: float) -> None:
        if "loss" not in values:
            return
        self._clock.step_ended(step)
        self._clock.saw(values["loss"], values["grad_norm"])
        if self._profiler is not None:
            self._profiler.step_ended(step)

    def warn(self, message: str) -> None:
        print(f"warning: {message}", flush=True)


def parameters_of(task: Task, batch: int) -> FinetuneParameters:
    return FinetuneParameters(
        apply_lora=True,
        lora_r=task.lora["r"],
        lora_alpha=task.lora["lora_alpha"],
        lora_dropout=task.lora["lora_dropout"],
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        evaluation_strategy="disable",
        logging_strategy="steps",
        logging_steps=1,
        checkpoint_seconds=86400,
        precision="32",
        seed=SEED,
    )


def write_rows(task: Task, folder: Path) -> None:
    """The split `train`, its rows laid so that the engine's shuffle brings them into the task's order."""
    import numpy as np
    import pyarrow as pa

    placed: list[Any] = [None] * len(task.rows)
    for row, place in zip(task.rows, epoch_order(SEED, 0, len(task.rows)), strict=True):
        placed[place] = row
    table = pa.table(
        {
            "input_ids": pa.array([row["input_ids"] for row in placed], type=pa.list_(pa.int32())),
            "learn": pa.array(
                [np.array(row["learn"], dtype=bool) for row in placed], type=pa.list_(pa.bool_())
            ),
            "row": pa.array(range(1, len(placed) + 1), type=pa.int64()),
        }
    )
    folder.mkdir(parents=True)
    with (
        pa.OSFile(str(folder / "train.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def open_model(task: Task, machine: training.Machine, parameters: FinetuneParameters) -> Any:
    base = lm.load_model(task.model, dtype=training.plan(parameters, machine).base_dtype)
    return lm.add_lora(
        base,
        parameters.lora_r,
        parameters.lora_alpha,
        parameters.lora_dropout,
        parameters.lora_target_modules,
        seed=SEED,
    )


def main() -> None:
    given = arguments(__doc__)
    lm.threads()
    lm.quiet()
    task = Task(given.task, given.batch)
    clock = Clock(task)
    profiler = None
    if given.profile:
        from train_speed_profile import Profiler

        profiler = Profiler(task)
    parameters = parameters_of(task, given.batch)
    machine = training.Machine.detect()
    model = open_model(task, machine, parameters)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(task, Path(folder) / "dataset")
        result = training.train(
            model,
            training.TrainingInputs(
                dataset_folder=Path(folder) / "dataset",
                parameters=parameters,
                checkpoint_folder=Path(folder) / "checkpoints",
            ),
            Watch(clock, profiler),
            machine,
        )
    settings = parameters.model_dump(mode="json", exclude_defaults=True)
    more = {"groups": profiler.groups(), "operators": profiler.operators()} if profiler else {}
    clock.write(given.out, settings=settings, engine=result.engine, **more)


if __name__ == "__main__":
    main()
