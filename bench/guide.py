"""The seed guide's way to train, as a peer: Hugging Face Trainer and PEFT on the CPU in float32.

    trainer = guide_trainer(guide_model(folder, checkpointing=True), rows, steps=12, checkpointing=True, …)
    trainer.train()

Batch 1 × accumulation 8, padding to the longest row, AdamW at 2e-4 with 5 warm-up steps, LoRA r=16 on all
seven projections. Only two things are other than in its script, neither to its harm: rows come tokenised, and
in an order that the caller chose, so that both sides can be given the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNTRAINED = -100  # a label that transformers leaves out of the loss


@dataclass(frozen=True)
class Row:
    tokens: Sequence[int]
    labels: Sequence[int]


@dataclass
class Clock(TrainerCallback):
    """When each optimizer step ended, and the loss that was logged for it."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def guide_base(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def guide_model(base: Any, checkpointing: bool) -> Any:
    """The base with the adapter on it."""
    if checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    base.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def guide_trainer(
    model: Any, rows: Sequence[Row], steps: int, accumulate: int, checkpointing: bool, pad: int, out: str
) -> tuple[Trainer, Clock]:
    """A Trainer that takes `rows` in their order, `accumulate` of them a step."""
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulate,
        gradient_checkpointing=checkpointing,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        warmup_steps=5,
        weight_decay=0.01,
        seed=8137,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    clock = Clock()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),  # type: ignore[arg-type]  # anything with a length and items will do
        data_collator=lambda chosen: _collate(chosen, pad),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def _collate(rows: Sequence[Row], pad: int) -> dict[str, torch.Tensor]:
    longest = max(len(r.tokens) for r in rows)
    return {
        "input_ids": torch.tensor([[*r.tokens, *[pad] * (longest - len(r.tokens))] for r in rows]),
        "attention_mask": torch.tensor([[1] * len(r.tokens) + [0] * (longest - len(r.tokens)) for r in rows]),
        "labels": torch.tensor([[*r.labels, *[UNTRAINED] * (longest - len(r.labels))] for r in rows]),
    }
