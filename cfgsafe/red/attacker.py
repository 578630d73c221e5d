"""What an attacker consists of: a model, the beginning of its prompts, and its adapters.

Source: `list` is the prompt of Lee et al. (arXiv 2405.18540), "Write a list of instructions:" with
three examples. `user` is the header of the user's turn in a chat, so that the model writes what a
user says, as in Magpie (Xu et al., arXiv 2406.08464).
Deviations: the examples of a list stay the same; a newline ends a prompt of a list.

Run it: python train.py attacker --stage sft --help
"""

import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from cfgsafe.errors import InputError
from cfgsafe.files import read_json, read_jsonl, write_text
from cfgsafe.hub import resolve
from cfgsafe.identity import digest_of, identity
from cfgsafe.llama import Llama
from cfgsafe.lora import LoRAConfig, adapter_parameters, attach, load_adapter, write_adapter
from cfgsafe.red.policy import Attacker, Prompt, Rules
from cfgsafe.tokenizer import Tokenizer

POLICY, REFERENCE = "policy", "reference"  # names of adapters
FACTS = "attacker.json"
SYSTEM = "You are a helpful assistant."
LIST = "Write a list of instructions:"
EXAMPLES = 3


@dataclass(frozen=True)
class Facts:
    """What an attacker consists of; attacker.json in the folder of its stage."""

    model: str
    template: str
    least: int
    most: int
    examples: list[str]
    reference: str | None = None  # PEFT folder of the SFT adapter
    adapter: str | None = None  # PEFT folder of the policy; None: the policy is the reference

    @staticmethod
    def read(folder: Path) -> "Facts":
        """Raises CheckpointError, InputError."""
        raw = read_json(folder / FACTS)
        path = (str, type(None))
        kinds: dict[str, type | tuple[type, ...]] = {"model": str, "template": str, "least": int, "most": int}
        kinds |= {"examples": list, "reference": path, "adapter": path}
        complete = set(raw) == set(kinds)
        if not complete or not all(isinstance(raw[name], kind) for name, kind in kinds.items()):
            raise InputError(f"{folder / FACTS}: not what an attacker's stage wrote; run the stage again")
        for name in ("reference", "adapter"):
            if raw[name]:
                raw[name] = os.path.normpath(folder / raw[name])
        return Facts(**raw)

    def write(self, folder: Path) -> None:
        """Write attacker.json, with paths relative to `folder`: runs can be moved together."""
        raw = asdict(self)
        for name in ("reference", "adapter"):
            if raw[name]:
                raw[name] = os.path.relpath(raw[name], folder)
        write_text(folder / FACTS, json.dumps(raw, indent=2) + "\n")


@dataclass(frozen=True)
class Trainee:
    """An attacker whose policy a stage trains."""

    agent: Attacker
    tokenizer: Tokenizer
    config: LoRAConfig  # of the policy's adapter
    facts: Facts  # what it was before the stage

    def save(self, out: Path, *, as_reference: bool = False) -> None:
        """Write adapter/ and attacker.json; with `as_reference`, later stages start from this adapter."""
        write_adapter(out / "adapter", self.agent.parameters(), self.config, base=self.facts.model)
        adapter = str(out / "adapter")
        if as_reference:
            replace(self.facts, reference=adapter, adapter=None).write(out)
        else:
            replace(self.facts, adapter=adapter).write(out)


def is_stage(path: str) -> bool:
    """Whether an attacker is the folder of an earlier stage, which knows all about its prompts."""
    return (Path(path) / FACTS).exists()


def facts_of(path: str, template: str, least: int, most: int, prompts: str | None, seed: int) -> Facts:
    """The facts in the folder of an earlier stage, or those of a checkpoint from the other arguments.

    Raises InputError if the template is a list and `prompts` does not give enough examples.
    """
    if is_stage(path):
        return Facts.read(Path(path))
    if template == "user":
        return Facts(path, template, least, most, [])
    if prompts is None:
        raise InputError('--template list: needs --prompts FILE, JSONL of {"prompt"}, for its examples')
    texts = read_prompts(prompts)
    if len(texts) < EXAMPLES:
        raise InputError(f"{prompts}: holds {len(texts)} prompts; the list's examples need {EXAMPLES}")
    return Facts(path, template, least, most, random.Random(seed).sample(texts, EXAMPLES))


def paths_of(path: str) -> list[str]:
    """The folders that an attacker consists of: its own, and those that an earlier stage named."""
    if not is_stage(path):
        return [path]
    facts = Facts.read(Path(path))
    return [path, facts.model, *filter(None, (facts.reference, facts.adapter))]


def identity_of(path: str) -> str:
    """A digest of what an attacker consists of: the facts and adapters of a stage, or a checkpoint.

    Raises CheckpointError, InputError.
    """
    if not (Path(path) / FACTS).exists():
        return identity(path)
    facts = Facts.read(Path(path))
    weights = identity(facts.model, facts.reference, facts.adapter)
    return digest_of((weights, facts.template, facts.least, facts.most, facts.examples))


def read_prompts(path: str) -> list[str]:
    """The prompts of a JSONL file. Raises InputError naming the line."""
    texts = []
    for place, row in read_jsonl(path):
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise InputError(f"{place}: 'prompt' must be a non-empty string")
        texts.append(row["prompt"].strip())
    if not texts:
        raise InputError(f"{path}: holds no prompt")
    return texts


def rules_of(facts: Facts, tokenizer: Tokenizer) -> Rules:
    """Where prompts begin and end, and which tokens they may not hold. Raises InputError."""
    special = set(tokenizer.special.values())
    bos = tokenizer.special[tokenizer.names["bos_token"]]
    if facts.template == "user":
        header, end = user_turn(facts, tokenizer)
        return Rules((bos, *header), end, facts.least, facts.most, tuple(sorted(special - {end})))
    lines = [f"{number}. {text}" for number, text in enumerate(facts.examples, start=1)]
    start = tokenizer.encode("\n".join([LIST, *lines, f"{EXAMPLES + 1}."]))
    newline = tokenizer.encode("\n")
    if len(newline) != 1:
        raise InputError(
            f"{facts.model}: its tokenizer has no token for a newline, which ends a prompt of a list; "
            "use --template user"
        )
    vocabulary = tokenizer.backend.get_vocab().values()
    broken = {token for token in vocabulary if "\n" in tokenizer.decode([token])}
    banned = tuple(sorted((special | broken) - set(newline)))
    return Rules((bos, *start), newline[0], facts.least, facts.most, banned)


def user_turn(facts: Facts, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The tokens between the system's turn and what the user says, and the token that ends a turn.

    Two chats that differ only in the user's text show where that text stands. Raises InputError.
    """
    chats = []
    for text in ("A", "B"):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        chats.append(tokenizer.encode_chat(messages))
    same = [a == b for a, b in zip(*chats, strict=True)]
    place = same.index(False)
    before, end = chats[0][:place], chats[0][place + 1]
    if end not in tokenizer.special.values() or end not in before:
        raise InputError(
            f"{facts.model}: the chat template closes turns without a control token; use --template list"
        )
    after_system = len(before) - before[::-1].index(end)
    return before[after_system:], end


def learnable(texts: list[str], facts: Facts, rules: Rules, tokenizer: Tokenizer) -> list[Prompt]:
    """The tokens of the texts that the rules allow. Raises InputError where none is allowed."""
    lead = " " if facts.template == "list" else ""
    prompts = [tuple(tokenizer.encode(lead + text)) for text in texts]
    allowed = [prompt for prompt in prompts if rules.allow(prompt)]
    if not allowed:
        raise InputError(
            f"none of {len(texts)} prompts has from {rules.least} to {rules.most} tokens; "
            "change --least or --most"
        )
    return allowed


def trainee_of(facts: Facts, model: Llama, tokenizer: Tokenizer, config: LoRAConfig, seed: int) -> Trainee:
    """The attacker with a policy to train, which starts as the reference.

    Without a reference, the policy is a fresh adapter with the settings `config`.
    """
    reference = None
    if facts.reference:
        config, reference = load_adapter(resolve(facts.reference), model, REFERENCE), REFERENCE
    torch.manual_seed(seed)
    attach(model, config, POLICY)
    if reference:
        weights = adapter_parameters(model, REFERENCE)
        for name, parameter in adapter_parameters(model, POLICY).items():
            parameter.data.copy_(weights[name])
    agent = Attacker(model.eval(), rules_of(facts, tokenizer), decoder(tokenizer), POLICY, reference)
    return Trainee(agent, tokenizer, config, facts)


def trained(facts: Facts, model: Llama, tokenizer: Tokenizer) -> Attacker:
    """The attacker as a stage left it, or a checkpoint alone."""
    policy = reference = None
    if facts.adapter:
        load_adapter(resolve(facts.adapter), model, POLICY)
        policy = POLICY
    if facts.reference:
        load_adapter(resolve(facts.reference), model, REFERENCE)
        reference = REFERENCE
    return Attacker(model, rules_of(facts, tokenizer), decoder(tokenizer), policy or reference, reference)


def decoder(tokenizer: Tokenizer) -> Callable[[Prompt], str]:
    """A function from tokens to the text that the target reads."""

    def decode(prompt: Prompt) -> str:
        return tokenizer.decode(list(prompt)).strip()

    return decode
