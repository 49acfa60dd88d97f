"""The update of TRL 1.12.0's GRPOTrainer on given responses: for each line that it reads it runs one, and prints "done".

    TRL_PYTHON -m benchmarks.peers.trl_update --model FOLDER --batch FILE --rows 8 --threads 1

The file is `torch.save` of a dict: prompts (B, P), responses as flat ``token_ids`` (N,) and ``lengths`` (B,), and
``advantages`` (N,). They replace the responses that the trainer would sample. The rest is TRL's own: it shuffles them, cuts
them into micro-batches as wide as the longest response of the batch, and runs one optimizer update.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks import workload

GROUP_SIZE = 8


def padded(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The responses in the form in which the trainer returns sampled ones."""
    lengths = given["lengths"].tolist()
    ids, advantages = (
        pad_sequence(list(given[name].split(lengths)), batch_first=True) for name in ("token_ids", "advantages")
    )
    mask = (torch.arange(ids.shape[1]) < given["lengths"][:, None]).long()
    return {
        "prompt_ids": given["prompts"],
        "prompt_mask": torch.ones_like(given["prompts"]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": -torch.ones_like(advantages),
        "num_items_in_batch": mask.sum(),
    }


class Updates(GRPOTrainer):
    """Takes given responses instead of sampling."""

    given: dict[str, Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
        if not sys.stdin.readline():
            os._exit(0)
        return dict(self.given)


class Done(TrainerCallback):
    """Reports the end of each update."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        print("done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    given = torch.load(options.batch)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=options.rows,
            gradient_accumulation_steps=len(given["lengths"]) // options.rows,
            num_generations=GROUP_SIZE,
            max_steps=10**6,
            learning_rate=2e-4,
            beta=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
        )
        trainer = Updates(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * 4096}),
            processing_class=workload.build_tokenizer(),
            callbacks=[Done()],
        )
        trainer.given = padded(given)
        trainer.train()


if __name__ == "__main__":
    main()
