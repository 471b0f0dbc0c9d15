"""One run of LLaMA-Factory's supervised fine-tuning, in its own environment; started by `train_speed.py`.

Its defaults but for what the comparison fixes, given to `run_exp` as its command line gives them. Rows come
as its own `tokenized_path`: the template has nothing to do.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from llamafactory.train.tuner import run_exp
from train_speed_clock import Clock, Task, arguments
from train_speed_peer_callback import Watch


def main() -> None:
    given = arguments(__doc__)
    torch.set_num_threads(1)
    task = Task(given.task, given.batch)
    clock = Clock(task)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        ids = [row["input_ids"] for row in task.rows]
        columns = {
            "input_ids": ids,
            "attention_mask": [[1] * len(each) for each in ids],
            "labels": list(task.labels()),
        }
        DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(str(rows))
        settings = {
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": task.lora["r"],
            "lora_alpha": task.lora["lora_alpha"],
            "lora_dropout": task.lora["lora_dropout"],
            "lora_target": "all",
            "template": "smollm2",
            "cutoff_len": task.max_length,
            "disable_shuffling": True,
            "disable_gradient_checkpointing": not given.checkpointing,
            "per_device_train_batch_size": given.batch,
            "learning_rate": task.learning_rate,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        where = {
            "model_name_or_path": str(task.model),
            "tokenized_path": str(rows),
            "dataset": "not_read",  # It asks for a name, and then takes the rows above.
            "output_dir": str(Path(folder) / "out"),
        }
        run_exp({**where, **settings}, callbacks=[Watch(task, clock)])
    clock.write(given.out, settings=settings)


if __name__ == "__main__":
    main()
