"""The TRL + PEFT variant of `python -m cfgsafe.bench orpo`, run by the Python that TRL is installed in.

Run it: python -m cfgsafe.bench orpo --trl PYTHON
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
import trl
from datasets import Dataset

from cfgsafe.kernels import measure

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Trainer(trl.ORPOTrainer):
    """Takes the rows in their order, as our variants do."""

    def _get_train_sampler(self):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Clock(transformers.TrainerCallback):
    """Seconds of each step."""

    def __init__(self, device):
        self.device, self.seconds = device, []

    def on_step_begin(self, *arguments, **more):
        self.started = time.perf_counter()

    def on_step_end(self, *arguments, **more):
        measure.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.started)


def main(settings):
    folder, device = Path(settings["folder"]), settings["device"]
    measure.cap(device, settings["memory_gib"])
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings["dtype"]]
    ceiling = measure.matmul_tflops(device, dtype)
    checkpoint = folder / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.eos_token
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=dtype).to(device)
    config = peft.LoraConfig(
        r=settings["rank"], lora_alpha=32, lora_dropout=0.0, target_modules=LAYERS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as out:
        arguments = trl.ORPOConfig(
            output_dir=out,
            per_device_train_batch_size=settings["pairs"],
            num_train_epochs=1,
            learning_rate=1e-4,
            logging_steps=1,
            max_length=settings["prompt"] + settings["answer"],
            max_prompt_length=settings["prompt"],
            beta=0.1,
            optim="adamw_torch",
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
            use_cpu=device == "cpu",
            disable_tqdm=True,
        )
        clock = Clock(device)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            tokenizer=tokenizer,
            callbacks=[clock],
        )
        before = measure.start_peak(device, model)
        trainer.train()
        peak = measure.peak(device) - before
    steps = [entry for entry in trainer.state.log_history if "nll_loss" in entry]
    loss = steps[0]["nll_loss"] - 0.1 * steps[0]["log_odds_ratio"]  # the loss that TRL logs is rounded
    figures = {"seconds": clock.seconds[1:], "loss": loss, "peak_bytes": peak, "ceiling": ceiling}
    print(json.dumps(figures))


main(json.loads(sys.argv[1]))
