"""Makes the golden figures of tests/test_trl.py with a real TRL 0.11.4.

They are loss and gradient norm of each step, and the final adapter, on two data sets of 16 pairs over a tiny
random Llama. `truncated`: prompts and answers are cut. `merged`: the boundary between the two merges
one token, BOS is missing from half of the prompts, and the end token from most answers.

Run it, in an environment of its own, in this folder:
    pip install trl==0.11.4 transformers==4.45.2 peft==0.13.2 "accelerate<1.1" "datasets<4" rich
    python make.py
"""

import json
import os
import random

import peft
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
WORDS = (
    "the cat works in a small town and likes to work at night when people sleep "
    "walking talked worker towns likely"
).split()
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
rng = random.Random(0)


def sentence(least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(least, most)))


def make_tokenizer():
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(300)]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[4], pad_token=SPECIAL[4]
    )


def make_model(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def truncated_rows() -> list[dict]:
    chat = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    answer = lambda: sentence(2, 30) + "<|eot_id|>"
    return [
        {"prompt": chat.format(sentence(8, 45)), "chosen": answer(), "rejected": answer()} for _ in range(16)
    ]


def merged_rows(tokenizer) -> list[dict]:
    stems = [
        ("the cat w", "orks at night", "alks in town"),
        ("in a small to", "wn", "wns at night"),
        ("people tal", "ked", "ked and sleep"),
    ]
    stems += [("a cat like", "ly works", "s to sleep"), ("when wor", "ker sleep", "king people")]
    rows = []
    for n in range(16):
        stem, *tails = stems[n % 5]
        chosen, rejected = tails if n // 5 % 2 == 0 else reversed(tails)
        prompt = ("" if n % 2 else "<|begin_of_text|>") + sentence(2, 6) + " " + stem
        end = "<|eot_id|>" if n % 3 == 0 else ""
        rows.append(
            {
                "prompt": prompt,
                "chosen": f"{chosen} {sentence(1, 4)}",
                "rejected": f"{rejected} {sentence(1, 6)}{end}",
            }
        )

    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    lost = lambda row, side: (
        len(ids(row["prompt"]))
        - len(os.path.commonprefix([ids(row["prompt"]), ids(row["prompt"] + row[side])]))
    )
    rows = [
        row for row in rows if max(lost(row, "chosen"), lost(row, "rejected")) <= 1
    ]  # TRL moves the boundary by one token only
    return (rows * 3)[:16]


class Trainer(trl.ORPOTrainer):
    def _get_train_sampler(self):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    base = make_model(tokenizer)
    base.save_pretrained("model")
    tokenizer.save_pretrained("model")
    data = {"truncated": (truncated_rows(), 48, 30), "merged": (merged_rows(tokenizer), 128, 100)}
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=LAYERS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained("init")
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
    versions = {module.__name__: module.__version__ for module in (trl, transformers, peft, torch)}
    golden = {"versions": versions, "runs": {}}
    for name, (rows, max_length, max_prompt_length) in data.items():
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in start:
                    parameter.copy_(start[key])
        with open(f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        arguments = trl.ORPOConfig(
            output_dir="/tmp/trl-out",
            per_device_train_batch_size=2,
            num_train_epochs=2,
            learning_rate=1e-3,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            logging_steps=1,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            beta=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch",
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), tokenizer=tokenizer
        )
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        golden["runs"][name] = {
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "steps": steps,
        }
        model.save_pretrained(f"final-{name}")
    with open("golden.json", "w") as file:
        json.dump(golden, file, indent=1)


main()
