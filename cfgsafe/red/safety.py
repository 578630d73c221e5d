"""Safety tuning: the target learns to refuse the attacks that made it give personal data away.

Source: Lee et al. (arXiv 2405.18540): prompts with a score above 0.5 get refusals that the target
itself writes; SFT with LoRA.
Deviations: an attack is refused in the conversations in which it succeeded, under their own system
prompts. Refusals are written under the positive system prompt, guided on request, and checked like
the chosen sides of pairs. The label mask comes from the chat prompt, with one BOS and the
generation prompt. With --retain, the model also learns its own current answers to ordinary
conversations, so that they stay the same.

Contexts JSONL: {"id", "messages", "items"} a line; the attack is the user's turn after "messages".
Retain JSONL: {"messages"} a line, where an answer at the end is left out; the target's own answer
may not hold "items", if they are given.
Writes OUT/safety.jsonl (prompt, chosen, and as rejected the answer with personal data; attack and
context say where a row comes from), safety.json (the options), and what `train.py orpo --objective
sft` writes. That command can train on safety.jsonl on several GPUs.

Run it: python train.py safety --model cfgsafe/demo/leaky --attacks attacks.jsonl --out runs/safety
"""

import json
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from cfgsafe.blue import options as orpo_options
from cfgsafe.blue import orpo, resume
from cfgsafe.blue.earlier import replacing
from cfgsafe.errors import InputError, Unused, at
from cfgsafe.fields import Count, Guidance, Positive, Rate, Seed, Temperature, Threshold, check_ranges
from cfgsafe.files import make_folder, read_jsonl, write_jsonl
from cfgsafe.identity import contents
from cfgsafe.llama import Llama
from cfgsafe.measure.leak import Prompt, examine, read_prompts, without_answer
from cfgsafe.outputs import Detectors, Folder, InputPath
from cfgsafe.pii import ner
from cfgsafe.pii.known import Known
from cfgsafe.pii.ner import Detector
from cfgsafe.red.guard import Guard
from cfgsafe.red.records import SUCCESS, Attack, Trial, read_attacks
from cfgsafe.red.rewards import ended, read_contexts
from cfgsafe.settings import shown
from cfgsafe.subject import Subject, checked_request, complete, load
from cfgsafe.tokenizer import Tokenizer

WRITES = ("safety.jsonl", "safety.json", *orpo_options.WRITES)  # to --out


@dataclass(kw_only=True)
class Options(Subject):
    """Teach a model to refuse the attacks that succeeded against it."""

    guidance: Guidance | None = None
    """Guidance strength g for writing refusals; by default the positive system prompt alone."""
    attacks: tuple[InputPath, ...]
    """attacks.jsonl of one run or several."""
    contexts: InputPath | None = None
    """JSONL of the conversations that the attacks were put to, as for eval.py attack."""
    out: Annotated[str, Folder(WRITES)]
    """Folder for safety.jsonl, the adapters and their metrics."""
    known: InputPath | None = None
    """JSONL of values that no learnt answer may hold: dialogues with "spans", or "items"."""
    ner: Detectors | None = None
    """Detector of what no refusal may hold; by default en_core_web_trf if installed, else the demo's."""
    guard: InputPath | None = None
    """Llama-Guard-3 checkpoint that must find refusals safe, for attacks that were found with it."""
    success: Threshold = SUCCESS
    """The model learns to refuse attacks with a mean score above this."""
    limit: Count | None = None
    """Maximum number of attack texts to learn from; the most successful ones are taken."""
    tries: Count = 4
    """Maximum number of samples for each conversation; sampling stops at a clean refusal."""
    temperature: Temperature = 0.7
    """Sampling temperature of the refusals."""
    max_new_tokens: Count = 256
    """Longest refusal or answer to retain, in tokens; one that does not end by then is dropped."""
    retain: InputPath | None = None
    """JSONL of ordinary conversations that the model should go on answering as now."""
    epochs: Count = 2
    """Passes over the data."""
    lr: Rate = 5e-5
    """Peak learning rate."""
    batch_size: Count = 32
    """Answers per forward pass."""
    grad_accum: Count = orpo.Options.grad_accum
    """Forward passes per step."""
    rank: Count = orpo.Options.rank
    """LoRA rank of a new adapter; --adapter has its own."""
    lora_alpha: Positive = orpo.Options.alpha
    """LoRA alpha of a new adapter; --adapter has its own."""
    seed: Seed = 0
    """Seed of refusals, order of the data, and initial weights of the adapter."""
    resume: bool = False
    """Go on with the run in --out, with the data that it wrote."""

    def unused(self) -> Unused:
        """See `errors.Unused`. Without --guidance, refusals are written with the positive sentence alone."""
        if self.guidance is None:
            yield "without --guidance", "space", "negative"
        if self.temperature == 0:
            yield from self.unused_if_greedy()
        if self.adapter is not None:
            yield "with --adapter, which has its own", "rank", "lora_alpha"


# Options that have the same name in train.py orpo.
SHARED = ("lr", "batch_size", "grad_accum", "epochs", "rank", "seed", "device", "dtype")
FREE = ("out", "resume", "device", "batch")  # a resumed run may change these


def run(options: Options) -> None:
    check_ranges(options)
    attacked = leaking(read_attacks(*options.attacks), options)
    out = make_folder(options.out)
    with replacing(out, WRITES, resumed=options.resume):
        _run(options, out, attacked)


def _run(options: Options, out: Path, attacked: list[tuple[str, Trial]]) -> None:
    data = out / "safety.jsonl"
    held = contents(
        options, folders=("model", "adapter", "guard"), files=("attacks", "contexts", "known", "retain")
    )
    held["ner"] = ner.identity(options.ner)
    resume.begin(out, asdict(options), held, FREE, resumed=options.resume, file="safety.json")
    training = options.resume and (out / resume.CONFIG).exists()
    if not training:
        write_jsonl(data, build(attacked, options))
        torch.cuda.empty_cache()  # free the memory of the model that wrote the answers
    rows = [row for _, row in read_jsonl(data)]
    sft = orpo.Options(options.model, str(data), options.out, objective="sft")
    sft.init_adapter, sft.alpha = options.adapter, options.lora_alpha
    for name in SHARED:
        setattr(sft, name, getattr(options, name))
    sft.resume = training
    orpo.run(sft)
    refusals = sum("attack" in row for row in rows)
    summary = {
        "out": options.out,
        "attacks": len({text for text, _ in attacked}),
        "conversations": len(attacked),
        "refusals": refusals,
        "dropped": len(attacked) - refusals,
        "retained": len(rows) - refusals,
    }
    print(json.dumps(summary))


def leaking(attacks: list[Attack], options: Options) -> list[tuple[str, Trial]]:
    """(text, trial) for each conversation in which one of the best attacks succeeded, each pair once.

    Raises InputError where there is none.
    """
    successful = [attack for attack in attacks if attack.succeeds(options.success)]
    best = sorted(successful, key=lambda attack: -attack.known_score)
    texts = list(dict.fromkeys(attack.text for attack in best))[: options.limit]
    found: dict[tuple[str, str], Trial] = {}
    for attack in best:
        for trial in attack.trials:
            if attack.text in texts and (trial.score or 0.0) > SUCCESS:
                found.setdefault((attack.text, trial.context), trial)
    if not found:
        raise InputError(
            f"--attacks {' '.join(options.attacks)}: none scores above --success {options.success:g}; "
            "lower it or attack on"
        )
    return [(text, trial) for (text, _), trial in found.items()]


def build(attacked: list[tuple[str, Trial]], options: Options) -> list[dict[str, str]]:
    """The rows to train on, shuffled.

    Raises InputError for an unknown conversation, and where no refusal is clean.
    """
    prompts = attacked_prompts(attacked, options)
    ordinary = read_ordinary(options.retain) if options.retain else []
    known = Known.read(options.known) if options.known else Known()
    detector = Detector(options.ner)
    guard = None
    if options.guard:
        guard = Guard(*load(Subject(options.guard, device=options.device, dtype=options.dtype)))
    writer = Writer(options, *load(options))
    refusals = refuse(prompts, writer, detector, known, guard)
    if not any(refusals):
        raise InputError(
            f"none of {len(prompts)} conversations got a clean refusal; "
            "raise --tries or --guidance, or reword --positive"
        )
    rows = []
    for (text, trial), prompt, refusal in zip(attacked, prompts, refusals, strict=True):
        if refusal is None:
            continue
        row = writer.row(prompt, refusal)
        leak = trial.answer or ""
        rejected = leak + writer.tokenizer.end_of_turn
        if leak.strip() and not writer.tokenizer.joined_control_token(row["prompt"], rejected):
            row["rejected"] = rejected
        rows.append({**row, "attack": text, "context": trial.context})
    if ordinary:
        rows += retain(ordinary, writer, known)
    random.Random(options.seed).shuffle(rows)
    return rows


def attacked_prompts(attacked: list[tuple[str, Trial]], options: Options) -> list[Prompt]:
    """The conversation of each trial, ending with its attack. Raises InputError for an unknown one."""
    contexts = {context.id: context for context in read_contexts(options.contexts)}
    prompts = []
    for text, trial in attacked:
        if trial.context not in contexts:
            raise InputError(
                f"--contexts {options.contexts}: holds no {shown(trial.context)}, where {shown(text)} "
                "succeeded; give the attack run's file"
            )
        context = contexts[trial.context]
        prompts.append(replace(context, messages=ended(context, text)))
    return prompts


def read_ordinary(path: str) -> list[Prompt]:
    """Conversations up to the user's last message. Raises InputError naming the line."""
    prompts = read_prompts(path)
    return [replace(prompt, messages=without_answer(prompt.messages)) for prompt in prompts]


@dataclass(frozen=True)
class Writer:
    """The model that writes the answers to learn: the target itself."""

    options: Options
    model: Llama
    tokenizer: Tokenizer

    def answer(
        self,
        prompts: list[Prompt],
        guidance: float | None,
        temperature: float,
        rng: random.Random,
        title: str,
    ) -> list[str]:
        """An answer to each prompt, or "" where no row can hold the answer.

        That is so if it is blank or does not end by itself, and if the answer or its prompt contains
        the text of a control token, or both together do.
        """
        guarded = replace(self.options, guidance=guidance)
        sampling: dict = {"temperature": temperature, "max_new_tokens": self.options.max_new_tokens}
        requests = []
        for prompt in prompts:
            sampling["seed"] = rng.getrandbits(32)
            chat, place = prompt.messages, prompt.place
            requests.append(checked_request(guarded, self.model, self.tokenizer, chat, place, **sampling))
        completions = complete(self.model, requests, guarded.batch, title)
        texts = []
        for prompt, completion in zip(prompts, completions, strict=True):
            text = self.tokenizer.decode(completion.tokens)
            whole = completion.finish_reason == "stop" and text.strip()
            texts.append(text if whole and self.fits(prompt, text) else "")
        return texts

    def fits(self, prompt: Prompt, text: str) -> bool:
        """Whether a row can hold prompt and text, so that only the template has put control tokens in."""
        written = [text] + [message["content"] for message in prompt.messages]
        if any(map(self.tokenizer.control_token_in, written)):
            return False
        row = self.row(prompt, text)
        return self.tokenizer.joined_control_token(row["prompt"], row["chosen"]) is None

    def row(self, prompt: Prompt, text: str) -> dict[str, str]:
        """A row to train on: the rendered chat, and the text with its end token as chosen."""
        chosen = text + self.tokenizer.end_of_turn
        with at(prompt.place):
            return {"prompt": self.tokenizer.render_chat(prompt.messages), "chosen": chosen}


def refuse(
    prompts: list[Prompt], writer: Writer, detector: Detector, known: Known, guard: Guard | None
) -> list[str | None]:
    """The first clean answer to each prompt under the positive system prompt; None if none is clean."""
    options = writer.options
    guidance = 1.0 if options.guidance is None else options.guidance
    rng = random.Random(options.seed)
    found: list[str | None] = [None] * len(prompts)
    for attempt in range(1, options.tries + 1):
        todo = [number for number, refusal in enumerate(found) if refusal is None]
        asked = [prompts[number] for number in todo]
        title = f"refusals {attempt}/{options.tries}"
        texts = writer.answer(asked, guidance, options.temperature, rng, title)
        entities = detector([" ".join(text.split()) for text in texts])
        harm: list[float | None] = [0.0] * len(texts)
        if guard:
            harm = guard.judge([prompt.messages for prompt in asked], texts)
        for number, text, finds, unsafe in zip(todo, texts, entities, harm, strict=True):
            safe = unsafe is not None and unsafe <= SUCCESS
            if text and safe and examine(prompts[number], text, finds, known).clean:
                found[number] = text
    written = len(prompts) - found.count(None)
    print(f"{written} refusals to {len(prompts)} conversations", file=sys.stderr)
    return found


def retain(prompts: list[Prompt], writer: Writer, known: Known) -> list[dict[str, str]]:
    """Rows of the target's own greedy, unguided answers, without those that hold personal data."""
    texts = writer.answer(prompts, None, 0.0, random.Random(0), "answers to retain")
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        if text and examine(prompt, text, [], known).clean:
            rows.append(writer.row(prompt, text))
    return rows
