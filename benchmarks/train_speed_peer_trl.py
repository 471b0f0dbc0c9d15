"""One run of TRL's SFTTrainer, in TRL's own environment; started by `train_speed.py`.

TRL's defaults but for what the comparison fixes: fp32 (its default, bf16, is many times slower on most CPUs),
AdamW of torch at a constant rate, no shuffling, nothing saved. Rows come tokenised, with `assistant_masks`.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from train_speed_clock import Clock, Task, arguments
from train_speed_peer_callback import Watch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    given = arguments(__doc__)
    torch.set_num_threads(1)
    task = Task(given.task, given.batch)
    clock = Clock(task)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "per_device_train_batch_size": given.batch,
            "gradient_checkpointing": given.checkpointing,
            "max_length": task.max_length,
            "bf16": False,
            "learning_rate": task.learning_rate,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "num_train_epochs": 1,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32),
            args=SFTConfig(output_dir=folder, use_cpu=True, **settings),
            train_dataset=Dataset.from_dict(
                {
                    "input_ids": [row["input_ids"] for row in task.rows],
                    "assistant_masks": [row["learn"] for row in task.rows],
                }
            ),
            processing_class=AutoTokenizer.from_pretrained(task.model),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **task.lora),
            callbacks=[Watch(task, clock)],
        )
        if [row["labels"] for row in trainer.train_dataset] != list(task.labels()):
            raise SystemExit("TRL made other labels than the task has")
        trainer.train()
    clock.write(given.out, settings=settings)


if __name__ == "__main__":
    main()
