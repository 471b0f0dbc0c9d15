"""What both peers' trainers are watched with: they are Hugging Face's Trainer underneath. Imported in the
peers' own environments only."""

from __future__ import annotations

from typing import Any

from train_speed_clock import Clock, Task
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Starts every side from the same adapter, and stops the clock."""

    def __init__(self, task: Task, clock: Clock) -> None:
        self._task, self._clock = task, clock

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        tensors = load_file(self._task.adapter)
        found = set_peft_model_state_dict(model, tensors)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if found.unexpected_keys or len(trained) != len(tensors):
            raise SystemExit(f"the adapter does not fit: {found.unexpected_keys[:3]}, {len(trained)} tensors")
        dtypes = {str(parameter.dtype) for parameter in model.parameters()}
        if dtypes != {"torch.float32"}:
            raise SystemExit(f"this is not fp32: {dtypes}")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._clock.step_ended(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if logs and "loss" in logs:
            self._clock.saw(float(logs["loss"]), float(logs["grad_norm"]))
