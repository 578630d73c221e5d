"""Distil guidance into an adapter: one row then gives the distribution that a guided pair of rows gave.

Source: adapters distilled from guidance, for images (arXiv 2503.07274); the nearest for text is Divergence
Decoding (arXiv 2605.31293). The loss is KL(pair || student) of each token of the pair's own answers
(cfgsafe/distillation.py).
At temperature 1 its sum over an answer is an unbiased estimate of the KL between whole answers; greedy
answers stay closer to what is asked of a model that is always decoded greedily.
Deviations: answers are kept as text and encoded again, so rare ones have other tokens than were drawn. The
adapter of the pair is the student's beginning. Dropout is off, and there is one process.

Prompts JSONL, a line: {"messages"} as for eval.py leak, whose finished answer at the end is left out, or
{"question"} of a question-answer pair.
Writes to --out: answers.jsonl (kept between runs), epoch-N (PEFT adapter), metrics.jsonl, config.json and,
until the run ends, state-N.

Run it: python train.py distil --model M --adapter runs/orpo/epoch-3 --prompts prompts.jsonl --out runs/distil
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from cfgsafe.blue import batches, loop, memory, origin, resume
from cfgsafe.blue.earlier import replacing
from cfgsafe.blue.loop import Run
from cfgsafe.distillation import head_divergence
from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count, Guidance, Positive, Rate, Seed, Share, Temperature, Weight, Whole
from cfgsafe.files import make_folder, read_jsonl
from cfgsafe.hub import resolve
from cfgsafe.identity import contents, digest_of
from cfgsafe.llama import Llama
from cfgsafe.lora import LoRAConfig, adapter_parameters, attach, load_adapter, write_adapter
from cfgsafe.lora_config import TARGETS, read_adapter_config
from cfgsafe.measure.leak import Prompt
from cfgsafe.outputs import Folder, InputPath
from cfgsafe.parallel import World, world_size
from cfgsafe.pii.facts import SYSTEM
from cfgsafe.request import Request
from cfgsafe.rescore import continuation_states, guided_logprobs, side_logits
from cfgsafe.subject import ANSWER_TOKENS, Subject, answers, check, load, request_for
from cfgsafe.tokenizer import Messages, Tokenizer

WRITES = ("epoch-*", "state-*", "metrics.jsonl", "config.json", "answers.jsonl")  # to --out
FREE = ("prompts", "out", "batch", "recompute", "save_every", "resume", "device")  # may change on --resume
STUDENT = "student"  # name of the adapter that is trained; that of the pair is `lora.DEFAULT`
LOGGED = ("kl",)


@dataclass(kw_only=True)
class Options(Subject):
    """Train an adapter whose single row gives the guided distribution of a pair of rows."""

    guidance: Guidance = 3.0
    """Guidance strength g of the pair to imitate."""
    prompts: InputPath
    """JSONL of conversations ("messages") or questions ("question") that the pair answers."""
    out: Annotated[str, Folder(WRITES)]
    """Folder for the answers, the adapters and their metrics."""
    student: Literal["positive", "none"] = "positive"
    """Prompt of the single row: positive has the positive sentence, none only the conversation's own."""
    limit: Count | None = None
    """Use only the first prompts."""
    samples: Count = 1
    """Answers to each prompt."""
    temperature: Temperature = 1.0
    """Sampling temperature of the answers; 0 is greedy."""
    max_new_tokens: Count = ANSWER_TOKENS
    """Longest answer, in tokens."""
    rank: Count = 16
    """LoRA rank of a new adapter; --adapter has its own."""
    lora_alpha: Positive = 32.0
    """LoRA alpha of a new adapter; --adapter has its own."""
    targets: tuple[str, ...] = TARGETS
    """Linear layers that get a new adapter; --adapter has its own."""
    lr: Rate = 5e-4
    """Peak learning rate; it falls along a cosine."""
    lr_min_ratio: Share = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    batch_size: Count = 4
    """Answers in a forward pass."""
    grad_accum: Count = 1
    """Forward passes in a step of the optimiser."""
    epochs: Count = 2
    """Passes over the answers."""
    max_grad_norm: Weight = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it. 0: no limit."""
    recompute: Whole | None = None
    """Blocks to recompute in the backward pass; by default as few as the GPU's memory allows."""
    seed: Seed = 0
    """Seed of the answers, of their order, and of a new adapter's initial weights."""
    save_every: Count = 100
    """Steps between two saved states, which --resume starts from."""
    resume: bool = False
    """Continue the run in --out from its last saved state."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if self.adapter is not None:
            yield "with --adapter, which has its own", "rank", "lora_alpha", "targets"
        if self.temperature == 0:
            yield "on greedy answers, which are all the same", "samples"


@dataclass(frozen=True)
class Example:
    """An answer of the pair, and the prompts under which it is scored."""

    pair: Request
    student: list[int]  # token ids of the single row's prompt
    answer: list[int]  # token ids, with the end token where the answer ended
    place: str  # file:line of its prompt

    @property
    def tokens(self) -> int:
        """Tokens of its longest row."""
        return max(map(len, [*self.pair.rows, self.student])) + len(self.answer)


def run(options: Options) -> None:
    check(options)
    if world_size() > 1:
        raise InputError("train.py distil is one process; run it without torchrun")
    prompts = read_prompts(options.prompts)[: options.limit]
    out = make_folder(options.out)
    with replacing(out, WRITES, resumed=options.resume):
        if options.resume:  # before the pair answers
            resume.check_same_run(out / resume.CONFIG, settings_of(options), held_by(options), FREE)
        model, tokenizer = load(options)
        examples = answered(prompts, model, tokenizer, options, out)
        kl = train(model, examples, options, out)
    print(json.dumps({"out": str(out), "prompts": len(prompts), "answers": len(examples), "kl": kl}))


def read_prompts(path: str) -> list[tuple[str, Messages]]:
    """(place, conversation to answer) of each line. Raises InputError naming line and field."""
    prompts: list[tuple[str, Messages]] = []
    for place, row in read_jsonl(path):
        if "messages" in row:
            messages = Prompt.from_row(row, place).messages
        elif "question" in row:
            question = row["question"]
            if not isinstance(question, str) or not question.strip():
                raise InputError(f"{place}: 'question' must be a non-empty string")
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        else:
            raise InputError(f"{place}: needs 'messages' or 'question'")
        prompts.append((place, messages))
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


def answered(
    prompts: list[tuple[str, Messages]], model: Llama, tokenizer: Tokenizer, options: Options, out: Path
) -> list[Example]:
    """--samples answers of the pair to each prompt, without those that the model could not give.

    Raises InputError and ContextError naming the prompt's place, and InputError where no answer is left.
    """
    asked = [prompt for prompt in prompts for _ in range(options.samples)]
    chats, places = [messages for _, messages in asked], [place for place, _ in asked]
    longest, drawn = options.max_new_tokens, (options.temperature, options.seed)
    given = answers(
        options, model, tokenizer, chats, "answers", longest, places, out / "answers.jsonl", *drawn
    )
    end, examples = tokenizer.special[tokenizer.end_of_turn], []
    for (place, messages), answer in zip(asked, given, strict=True):
        pair = request_for(options, tokenizer, messages)
        student = pair.prompt if options.student == "positive" else tokenizer.encode_chat(messages)
        ids = tokenizer.encode(answer.text) + ([] if answer.cut else [end])
        room = model.config.max_position_embeddings - max(map(len, [*pair.rows, student]))
        if not answer.broken and ids[:room]:
            examples.append(Example(pair, student, ids[:room], place))
    if not examples:
        raise InputError(f"--prompts {options.prompts}: the pair gave no answer to any of them")
    if len(examples) < len(asked):
        print(f"{len(asked) - len(examples)} of {len(asked)} prompts got no answer", file=sys.stderr)
    return examples


def train(model: Llama, examples: list[Example], options: Options, out: Path) -> float | None:
    """Attach the student to `model`, which carries the pair's adapter, and train it.

    Returns the KL of the last step; None if all steps were done before. Raises what `loop.go` raises.
    """
    world = World(0, 1, options.device)
    torch.manual_seed(options.seed)
    config = add_student(model, options)
    parameters = adapter_parameters(model, STUDENT)
    order = batches.Order(options.epochs, options.batch_size, options.grad_accum, options.seed)
    steps = batches.plan([example.tokens for example in examples], order)
    slots = options.batch_size * max(example.tokens for example in examples)
    weights = list(parameters.values())
    model.recomputed = memory.blocks_to_recompute(model, slots, weights, options.recompute, world)

    def loss(numbers: list[int]) -> tuple[Tensor, Tensor]:
        kl = batch_divergence(model, [examples[number] for number in numbers]).mean()
        return kl, kl.detach()[None].cpu()

    def end_epoch(epoch: int) -> None:
        write_adapter(out / f"epoch-{epoch}", parameters, config, base=options.model)

    data = digest_of([(example.student, example.answer) for example in examples])
    optimiser = loop.adam(parameters, options.lr)
    this = Run(options, world, parameters, optimiser, examples, loss, LOGGED, LOGGED, data)
    inherited = origin.is_cfg_aware(options.adapter) if options.adapter else False
    recorded = {origin.CFG_AWARE: inherited}
    done = loop.begin(this, settings_of(options), recorded, held_by(options), FREE, out, steps)
    last = loop.go(this, steps, done, out, f"distil {out.name}", end_epoch)
    return last.get("kl")


def add_student(model: Llama, options: Options) -> LoRAConfig:
    """Attach the student: a copy of the pair's adapter, or a fresh one; only it is trained."""
    if options.adapter is None:
        config = config_of(options)
        attach(model, config, STUDENT)
        return config
    config = load_adapter(resolve(options.adapter), model, STUDENT)
    for parameter in adapter_parameters(model, STUDENT).values():
        parameter.requires_grad_()
    return config


def config_of(options: Options) -> LoRAConfig:
    """The student's settings: those of the pair's adapter, or of a fresh one."""
    if options.adapter is not None:
        return read_adapter_config(resolve(options.adapter))
    return LoRAConfig(options.rank, options.lora_alpha, targets=options.targets)


def settings_of(options: Options) -> dict:
    """What the run uses, for config.json: the adapter's own size."""
    config = config_of(options)
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    return asdict(options) | {"rank": config.rank, "lora_alpha": config.alpha, "targets": targets}


def held_by(options: Options) -> dict[str, str]:
    """What the files of the run hold, by `identity.contents`."""
    return contents(options, folders=("model", "adapter"), files=("prompts",))


def batch_divergence(model: Llama, examples: list[Example]) -> Tensor:
    """KL(pair || student) of each of the N tokens of the answers, in their order, (N,) float32.

    The student's adapter is set when this returns, as a backward that recomputes blocks needs it.
    """
    given, request = [example.answer for example in examples], examples[0].pair
    rows = list(zip(*(example.pair.rows for example in examples), strict=True))  # of each side
    with torch.no_grad():
        sides = [side_states(model, list(prompts), given, request.adapter) for prompts in rows]
    hidden = side_states(model, [example.student for example in examples], given, STUDENT)

    def teacher(part: slice) -> Tensor:
        logits = side_logits(model, request, [states[part] for states in sides])
        return guided_logprobs(request, logits[0], logits[1] if request.guided else None)

    return head_divergence(model, STUDENT, hidden, teacher)


def side_states(
    model: Llama, prompts: list[list[int]], given: list[list[int]], adapter: str | None
) -> Tensor:
    """Hidden states (N, C) that predict the N tokens of all answers after these prompts."""
    return torch.cat(continuation_states(model, prompts, given, [adapter] * len(prompts)))
