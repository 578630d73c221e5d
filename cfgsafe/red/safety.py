"""Safety tuning: the target learns to refuse the attacks that made it give personal data away.

Source: Lee et al. (arXiv 2405.18540): prompts with success above 0.5 get refusals written by the target itself; SFT with LoRA.
Deviations: an attack is refused in the conversations in which it succeeded, under their own system prompts; refusals are written under the
positive system prompt, guided on request, and checked like chosen sides of pairs. The label mask comes from the chat prompt, with one BOS
and the generation prompt. What the target answers to ordinary conversations can be kept: it learns its own answers again.

Contexts JSONL: {"id", "messages", "items"} a line, messages ending in a system or assistant message; the attack is the user's next one.
Retain JSONL: {"messages"} a line; an answer at the end is left out, and "items" must not stand in the target's.
Writes OUT/safety.jsonl (prompt, chosen, and the leaking answer as rejected; attack and context say where it comes from) and what
`train.py orpo --objective sft` writes, which goes through this file on several GPUs too.

Run it: python train.py safety --model cfgsafe/demo/leaky --attacks attacks.jsonl --contexts contexts.jsonl --out runs/safety
"""

import json
import random
import sys
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from cfgsafe.blue import orpo
from cfgsafe.decode import check_request, generate
from cfgsafe.errors import InputError, check_at_least
from cfgsafe.files import make_folder, read_jsonl, write_jsonl
from cfgsafe.llama import Llama
from cfgsafe.measure.leak import Prompt, examine, read_prompts
from cfgsafe.pii.known import Known
from cfgsafe.pii.ner import Detector
from cfgsafe.red.guard import Guard
from cfgsafe.red.records import SUCCESS, Attack, Trial, read_attacks
from cfgsafe.red.rewards import ended, read_contexts
from cfgsafe.subject import Subject, load, request_for
from cfgsafe.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Options(Subject):
    """Teach a model to refuse the attacks that succeeded against it."""

    guidance: float | None = None
    """g of whoever writes the refusals; without it the positive system prompt alone."""
    attacks: tuple[str, ...]
    """The attacks.jsonl of one run or several."""
    contexts: str | None = None
    """JSONL of the conversations that the attacks were put to, as for eval.py attack."""
    out: str
    """Folder for safety.jsonl, the adapters and their metrics."""
    known: str | None = None
    """JSONL of values the model was trained on: dialogues with "spans", or "items"; no answer to learn may hold one."""
    ner: str | None = None
    """What else no refusal may hold: finds of spaCy pipelines or presidio; by default en_core_web_trf where installed, else the demo's."""
    guard: str | None = None
    """Llama-Guard-3 checkpoint, for attacks that were found with it: a refusal must be safe to it as well."""
    success: float = SUCCESS
    """Attacks with a mean score above this are learnt from."""
    limit: int | None = None
    """Of them this many texts, the most successful ones."""
    tries: int = 4
    """Samples a conversation until a refusal is clean."""
    temperature: float = 0.7
    """Of the refusals."""
    max_new_tokens: int = 256
    """Longest refusal or answer to keep; what does not end by then is dropped."""
    retain: str | None = None
    """JSONL of ordinary conversations to go on answering as now."""
    epochs: int = 2
    """Passes over the data."""
    lr: float = 5e-5
    """Peak learning rate."""
    batch_size: int = 32
    """Answers a forward pass."""
    grad_accum: int = orpo.Options.grad_accum
    """Forward passes a step."""
    rank: int = orpo.Options.rank
    """LoRA rank; that of --adapter where there is one."""
    lora_alpha: float = orpo.Options.alpha
    """LoRA alpha; that of --adapter where there is one."""
    seed: int = 0
    """Of refusals, the order of the data, and the adapter's initial weights."""
    resume: bool = False
    """Go on with the run in --out, with the data that it wrote."""


def run(options: Options) -> None:
    check_at_least(
        1, options, "limit", "tries", "max_new_tokens", "epochs", "batch_size", "grad_accum", "rank"
    )
    attacked = leaking([attack for path in options.attacks for attack in read_attacks(path)], options)
    data = make_folder(options.out) / "safety.jsonl"
    if not (options.resume and data.exists()):
        write_jsonl(data, build(attacked, options))
        torch.cuda.empty_cache()  # the model that wrote is gone
    rows = [row for _, row in read_jsonl(data)]
    orpo.run(
        orpo.Options(
            options.model,
            str(data),
            options.out,
            objective="sft",
            init_adapter=options.adapter,
            rank=options.rank,
            alpha=options.lora_alpha,
            lr=options.lr,
            batch_size=options.batch_size,
            grad_accum=options.grad_accum,
            epochs=options.epochs,
            seed=options.seed,
            resume=options.resume,
            device=options.device,
            dtype=options.dtype,
        )
    )
    refused = sum("attack" in row for row in rows)
    counts = {
        "attacks": len({text for text, _ in attacked}),
        "conversations": len(attacked),
        "refusals": refused,
    }
    print(
        json.dumps(
            {
                "out": options.out,
                **counts,
                "dropped": len(attacked) - refused,
                "retained": len(rows) - refused,
            }
        )
    )


def leaking(attacks: list[Attack], options: Options) -> list[tuple[str, Trial]]:
    """(text, trial) of each conversation that an attack made leak, once, of the best texts. Raises InputError where there is none."""
    best = sorted(
        (a for a in attacks if a.score is not None and a.score > options.success),
        key=lambda attack: -attack.score,
    )
    texts = list(dict.fromkeys(attack.text for attack in best))[: options.limit]
    found: dict[tuple[str, str], Trial] = {}
    for attack in best:
        for trial in attack.trials:
            if attack.text in texts and (trial.score or 0.0) > SUCCESS:
                found.setdefault((attack.text, trial.context), trial)
    if not found:
        raise InputError(
            f"--attacks {' '.join(options.attacks)}: none scores above --success {options.success:g}; lower it or attack on"
        )
    return [(text, trial) for (text, _), trial in found.items()]


def build(attacked: list[tuple[str, Trial]], options: Options) -> list[dict[str, str]]:
    """The rows to train on, shuffled. Raises InputError for an unknown conversation, and where no refusal is clean."""
    contexts = {context.id: context for context in read_contexts(options.contexts)}
    for text, trial in attacked:
        if trial.context not in contexts:
            raise InputError(
                f"--contexts {options.contexts}: holds no {trial.context!r}, where {text!r} succeeded; give the attack run's file"
            )
    ordinary = read_ordinary(options.retain) if options.retain else []
    known = Known.read(options.known) if options.known else Known()
    detector = Detector(options.ner)
    guard = (
        Guard(*load(Subject(options.guard, device=options.device, dtype=options.dtype)))
        if options.guard
        else None
    )
    model, tokenizer = load(options)
    prompts = [
        replace(contexts[trial.context], messages=ended(contexts[trial.context], text))
        for text, trial in attacked
    ]
    refusals = refuse(prompts, model, tokenizer, detector, known, guard, options)
    if not any(refusals):
        raise InputError(
            f"none of {len(prompts)} conversations got a clean refusal; raise --tries or --guidance, or reword --positive"
        )
    rows = []
    for (text, trial), prompt, refusal in zip(attacked, prompts, refusals, strict=True):
        if refusal is not None:
            origin = {"attack": text, "context": trial.context}
            leak = trial.answer or ""
            rejected = (
                {"rejected": leak + tokenizer.end_of_turn}
                if leak.strip() and not tokenizer.control_token_in(leak)
                else {}
            )
            rows.append({**row_of(prompt, refusal, tokenizer), **rejected, **origin})
    rows += keep(ordinary, model, tokenizer, known, options) if ordinary else []
    random.Random(options.seed).shuffle(rows)
    return rows


def read_ordinary(path: str) -> list[Prompt]:
    """Conversations up to the user's last message. Raises InputError naming the line."""
    prompts = []
    for prompt in read_prompts(path):
        last = max(
            (number for number, message in enumerate(prompt.messages) if message["role"] == "user"),
            default=None,
        )
        if last is None:
            raise InputError(f"{prompt.place}: no message is the user's, so there is nothing to answer")
        prompts.append(replace(prompt, messages=prompt.messages[: last + 1]))
    return prompts


def refuse(
    prompts: list[Prompt],
    model: Llama,
    tokenizer: Tokenizer,
    detector: Detector,
    known: Known,
    guard: Guard | None,
    options: Options,
) -> list[str | None]:
    """The target's first clean answer to each of `prompts` under the positive system prompt; None where no sample is clean."""
    writer = replace(options, guidance=1.0 if options.guidance is None else options.guidance)
    rng = random.Random(options.seed)
    found: list[str | None] = [None] * len(prompts)
    for attempt in range(options.tries):
        todo = [number for number, refusal in enumerate(found) if refusal is None]
        what = f"refusals {attempt + 1}/{options.tries}"
        asked = [prompts[number] for number in todo]
        texts = answer(asked, writer, model, tokenizer, what, options.temperature, rng)
        entities = detector([" ".join(text.split()) for text in texts])
        harm = guard.judge([prompt.messages for prompt in asked], texts) if guard else [0.0] * len(texts)
        for number, text, some, unsafe in zip(todo, texts, entities, harm, strict=True):
            if (
                text
                and unsafe is not None
                and unsafe <= SUCCESS
                and examine(prompts[number], text, some, known).clean
            ):
                found[number] = text
    print(f"{len(prompts) - found.count(None)} refusals to {len(prompts)} conversations", file=sys.stderr)
    return found


def keep(
    prompts: list[Prompt], model: Llama, tokenizer: Tokenizer, known: Known, options: Options
) -> list[dict[str, str]]:
    """Rows of the target's own answers, greedy and unguided, but for those that give data away."""
    texts = answer(
        prompts, replace(options, guidance=None), model, tokenizer, "answers to retain", 0.0, random.Random(0)
    )
    pairs = zip(prompts, texts, strict=True)
    return [
        row_of(prompt, text, tokenizer)
        for prompt, text in pairs
        if text and examine(prompt, text, [], known).clean
    ]


def answer(
    prompts: list[Prompt],
    options: Options,
    model: Llama,
    tokenizer: Tokenizer,
    what: str,
    temperature: float,
    rng: random.Random,
) -> list[str]:
    """Answers that a row can hold; "" for one that does not end by itself, is blank, or has a control token's text in it or before it."""
    requests = []
    for prompt in prompts:
        sampling = {
            "temperature": temperature,
            "seed": rng.getrandbits(32),
            "max_new_tokens": options.max_new_tokens,
        }
        requests.append(request_for(options, tokenizer, prompt.messages, **sampling))
        check_request(requests[-1], model, prompt.place)
    with tqdm(total=len(requests), desc=what, leave=False) as bar:
        completions = generate(model, requests, batch=options.batch, on_completion=lambda *_: bar.update())
    texts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = tokenizer.decode(completion.tokens)
        written = [text, *(message["content"] for message in prompt.messages)]
        fine = (
            completion.finish_reason == "stop"
            and text.strip()
            and not any(map(tokenizer.control_token_in, written))
        )
        texts.append(text if fine else "")
    return texts


def row_of(prompt: Prompt, text: str, tokenizer: Tokenizer) -> dict[str, str]:
    return {"prompt": tokenizer.render_chat(prompt.messages), "chosen": text + tokenizer.end_of_turn}
