"""TRL 1.12.0 on the workload: its PPOTrainer or GRPOTrainer, in one process, with generation by transformers.

    TRL_PYTHON -m benchmarks.peers.trl_ppo {ppo,grpo} --workload FOLDER --steps 4 --threads 2 --output FILE

Writes one row per iteration: seconds of ``generate``, ``score`` (everything else before the update), ``update`` and
``step``. TRL's PPO requires a reference and a reward model; it takes no reward function, so the reward model is a value
model with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)

from benchmarks import workload as work


class Times(TrainerCallback):
    """Measures the phases of each iteration, which TRL ends with ``on_step_end``."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._generate_s = 0.0
        self._started = self._scored = time.perf_counter()

    def start(self) -> None:
        self._started = time.perf_counter()

    def generating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            result = function(*args, **kwargs)
            self._generate_s += time.perf_counter() - before
            return result

        return timed

    def last_before_update(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._scored = time.perf_counter()
            return result

        return marked

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        ended = time.perf_counter()
        self.rows.append(
            {
                "generate": self._generate_s,
                "score": self._scored - self._started - self._generate_s,
                "update": ended - self._scored,
                "step": ended - self._started,
            }
        )
        self._generate_s, self._started = 0.0, ended


def common(folder: str) -> dict[str, Any]:
    """Settings of both trainers: one optimizer update of sixteen micro-batches, in float32."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": work.MICRO_BATCH_RESPONSES,
        "gradient_accumulation_steps": work.NUM_RESPONSES // work.MICRO_BATCH_RESPONSES,
        "learning_rate": work.LR,
        "temperature": 1.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }


def run_ppo(workload: Path, steps: int, generation_batch: int, folder: str, times: Times) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(workload / "model")
    # The padding token is outside of the model's vocabulary; TRL replaces it by 0 before the forward pass.
    rows = [tokenizer(text)["input_ids"] for text in prompts(workload)[: steps * work.NUM_PROMPTS]]
    dataset = Dataset.from_dict({"input_ids": [ids for ids in rows for _ in range(work.GROUP_SIZE)]})
    args = PPOConfig(
        **common(folder),
        total_episodes=steps * work.NUM_RESPONSES,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=work.RESPONSE_TOKENS,
        local_rollout_forward_batch_size=generation_batch,
        num_sample_generations=0,
    )
    ppo_trainer.batch_generation = times.generating(ppo_trainer.batch_generation)
    ppo_trainer.masked_whiten = times.last_before_update(ppo_trainer.masked_whiten)
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy(workload),
        ref_model=policy(workload),
        reward_model=value_model(workload),
        value_model=value_model(workload),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(args.per_device_eval_batch_size)),
        callbacks=[times],
    )
    trainer.train()


def run_grpo(workload: Path, steps: int, folder: str, times: Times) -> None:
    from trl import GRPOConfig, GRPOTrainer

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [work.parity(p, c, "even") for p, c in zip(prompts, completions, strict=True)]

    tokenizer = AutoTokenizer.from_pretrained(workload / "model")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # in GRPO the model reads the padding
    args = GRPOConfig(
        **common(folder),
        max_steps=steps,
        num_generations=work.GROUP_SIZE,
        max_completion_length=work.RESPONSE_TOKENS,
        beta=0.0,
    )
    trainer = GRPOTrainer(
        model=policy(workload),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts(workload)}),
        processing_class=tokenizer,
        callbacks=[times],
    )
    # TRL calls both once per iteration; the second calls the first.
    trainer._generate = times.generating(trainer._generate)
    trainer._generate_and_score_completions = times.last_before_update(trainer._generate_and_score_completions)
    trainer.train()


def prompts(workload: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in (workload / "prompts.jsonl").read_text().splitlines()]


def policy(workload: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(workload / "model", dtype=torch.float32)
    return model


def value_model(workload: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        workload / "model", num_labels=1, dtype=torch.float32
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("algorithm", choices=("ppo", "grpo"))
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--generation-batch", type=int, default=64, help="PPO: sequences generated together")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        if options.algorithm == "ppo":
            run_ppo(options.workload, options.steps, options.generation_batch, folder, times)
        else:
            run_grpo(options.workload, options.steps, folder, times)
    options.output.write_text(json.dumps(times.rows))


if __name__ == "__main__":
    main()
