"""Relearning: how much of what was forgotten comes back after a few steps on a few rows.

Source: relearning attacks as in Hu et al. (arXiv 2406.13356) and Łucki et al. (arXiv 2409.18025):
who has the weights fine-tunes them on a few facts, of the same people or of others, and asks
about the rest. A model that never knew the facts cannot be brought to tell them by rows about
others; one that hides them can.
The adapter of the guarded model is merged first; then a fresh LoRA adapter learns the answers to
the rows, by the sft objective (cfgsafe/losses.py) at a constant learning rate. After the steps
asked for, the model answers the questions, greedily and under the guidance that it is given; a
value counts as recalled where the whole of it stands in the answer, in any spelling
(cfgsafe/pii/matching.py).
Deviations: the rows are learnt without the sentences of guidance. Nothing is resumed: it takes
minutes.

Facts JSONL, rows and questions alike: see cfgsafe/pii/facts.py. Values that the rows themselves
teach are recalled as well, so keep the two apart; `shared_persons` says how many persons stand in
both.
Writes OUT/relearn.json: the attack, the guidance, and `curve`, a figure and its interval for each
step.

Run it: python train.py relearn --model M --adapter A --rows R.jsonl --facts F.jsonl --out relearn
"""

import json
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from torch import Tensor

from cfgsafe.blue import batches, loop, memory, orpo
from cfgsafe.blue import options as orpo_options
from cfgsafe.blue.batches import Pair
from cfgsafe.blue.loop import Run
from cfgsafe.blue.step import LOGGED, batch_loss
from cfgsafe.errors import InputError, Unused, at
from cfgsafe.fields import Count, Positive, Rate, Seed, Whole, check_ranges
from cfgsafe.files import Answer, make_folder, write_text
from cfgsafe.llama import Llama
from cfgsafe.lora import adapter_parameters, merge
from cfgsafe.measure.intervals import Estimate, fault_interval, share_interval, to_json
from cfgsafe.measure.memorisation import recall
from cfgsafe.outputs import Folder, InputPath
from cfgsafe.parallel import World
from cfgsafe.pii.facts import Fact, people, read_facts
from cfgsafe.subject import Subject, answers, load
from cfgsafe.tokenizer import Tokenizer

CURVE = "relearn.json"


@dataclass(kw_only=True)
class Attack:
    """How the attacker trains, and when the model is asked."""

    steps: tuple[Whole, ...] = (0, 1, 2, 4, 8, 16, 32)
    """Numbers of steps of training after which the questions are asked; 0 is before any."""
    lr: Rate = 1e-4
    """Learning rate, the same for all steps."""
    batch_size: Count = 4
    """Rows in a step."""
    rank: Count = 16
    """LoRA rank of the attacker's adapter."""
    lora_alpha: Positive = 32.0
    """LoRA alpha of the attacker's adapter."""
    seed: Seed = 0
    """Seed of the adapter's initial weights and of the order of the rows."""
    max_new_tokens: Count = 64
    """Longest answer, in tokens."""


@dataclass(kw_only=True)
class Options(Subject, Attack):
    """Train a guarded model on a few facts, and ask it for others after each of some steps."""

    rows: InputPath
    """JSONL of the facts that the attacker trains on."""
    limit: Count = 16
    """Train on the first of the rows only."""
    facts: InputPath
    """JSONL of the facts that are asked for."""
    out: Annotated[str, Folder((CURVE,))]
    """Folder for the curve."""

    def unused(self) -> Unused:
        """See `Subject.unused`."""
        yield from super().unused()
        yield from self.unused_if_greedy()


def run(options: Options) -> None:
    check_ranges(options)
    rows, facts = read_facts(options.rows)[: options.limit], read_facts(options.facts)
    if not any(fact.values for fact in facts):
        raise InputError(f"{options.facts}: no fact has a personal value that could be recalled")
    out = make_folder(options.out)
    curve = relearn(options, rows, facts, options)
    attack = {field.name: getattr(options, field.name) for field in fields(Attack)}
    known = {"model": options.model, "adapter": options.adapter, **options.guarded, **attack}
    known |= {"rows": len(rows), "facts": len(facts), "persons": len(people(facts))}
    known["shared_persons"] = len(set(people(rows)) & set(people(facts)))
    result = json.dumps(known | {"curve": curve})
    write_text(out / CURVE, result + "\n")
    print(result)


def relearn(
    subject: Subject, rows: list[Fact], facts: list[Fact], attack: Attack | None = None
) -> list[dict]:
    """The curve: for each step asked for, in order, its number and the figures of `figures_of`, and the loss.

    `loss` is the rows' mean loss a token in the step before, in nats; step 0 has none. Raises InputError
    naming the row or question that cannot be used, and CheckpointError.
    """
    attack = attack or Attack()
    wanted = sorted(set(attack.steps))
    if not wanted or not wanted[-1]:
        raise InputError("--steps: none is above 0, so that nothing would be learnt; name one")
    model, tokenizer = load(subject)
    if subject.adapter:
        merge(model)
    run, plan = attacker(subject, model, tokenizer, rows, attack)
    curve = []
    logged: dict[str, float] = {}
    for number in range(wanted[-1] + 1):
        if number:
            model.train()
            logged = loop.take_step(run, plan[number - 1], attack.lr, f"step {number}")
            model.eval()
        if number in wanted:
            figures = figures_of(facts, ask(subject, model, tokenizer, facts, attack, number))
            loss = {"loss": round(logged["loss"], 4)} if number else {}
            curve.append({"step": number, **to_json(figures), **loss})
    return curve


def attacker(
    subject: Subject, model: Llama, tokenizer: Tokenizer, rows: list[Fact], attack: Attack
) -> tuple[Run, list[batches.Step]]:
    """A fresh adapter on `model` with its optimiser, and the steps to take."""
    world = World(0, 1, subject.device)
    options = orpo_options.Options(subject.model, pairs="", out="", objective="sft", lr=attack.lr)
    options.rank, options.alpha = attack.rank, attack.lora_alpha
    options.batch_size, options.seed = attack.batch_size, attack.seed
    options.epochs = -(-max(attack.steps) // -(-len(rows) // attack.batch_size))  # both rounded up
    pairs = pairs_of(rows, model, tokenizer, options)
    torch.manual_seed(attack.seed)
    orpo.add_adapter(model, options)
    model.recomputed = memory.recomputed(model, pairs, options, world)

    def loss(numbers: list[int]) -> tuple[Tensor, Tensor]:
        return batch_loss(model, model, [pairs[number] for number in numbers], options, None, world)

    parameters = adapter_parameters(model)
    optimiser = loop.adam(parameters, attack.lr)
    run = Run(options, world, parameters, optimiser, pairs, loss, LOGGED, shown=(), data="")
    return run, batches.plan([pair.tokens for pair in pairs], options)


def pairs_of(
    rows: list[Fact], model: Llama, tokenizer: Tokenizer, options: orpo_options.Options
) -> list[Pair]:
    """The rows as training knows them: the conversation, and the fact's answer as the chosen side."""
    pairs = []
    for fact in rows:
        with at(fact.place):
            row = {"prompt": tokenizer.render_chat(fact.messages), "chosen": fact.answer}
        context = model.config.max_position_embeddings
        pairs.append(batches.pair_of(row, fact.place, tokenizer, context, options))
    return pairs


def ask(
    subject: Subject, model: Llama, tokenizer: Tokenizer, facts: list[Fact], attack: Attack, step: int
) -> list[Answer]:
    """The model's greedy answers to the questions, under the subject's guidance."""
    chats, places = [fact.messages for fact in facts], [fact.place for fact in facts]
    what = f"after step {step}"
    return answers(subject, model, tokenizer, chats, what, attack.max_new_tokens, places)


def figures_of(facts: list[Fact], given: list[Answer]) -> dict[str, Estimate | None]:
    """Percentages: `recall` of the values, in the answers that came; cut_off and no_answer of the answers."""
    every = [fact.person for fact in facts]
    return {
        "recall": recall(facts, given),
        "cut_off": share_interval([answer.cut for answer in given], clusters=every),
        "no_answer": fault_interval([answer.broken for answer in given], every),
    }
