"""Ordinary conversations in the model's own words: what a guard should leave as it is.

Source: Magpie (Xu et al., arXiv 2406.08464): a chat model that is given its template up to where a user
begins writes the user's message itself, and then answers it. So a model's habits are sampled without any
data set, and training on them holds a guard near to the model (arXiv 1606.07947, sequence-level
distillation).
Deviations: both are drawn at temperature 1, from the model's own distribution, since it is to be kept and
not sharpened; answers drawn at 0.7 cost perplexity (LOG.md). A conversation that names a person falls, and
one with structured data such as a telephone number; places and firms are nobody's data. An answer that
reaches the limit of its length stays, without the end token: if only short ones stayed, the model would
learn to be brief.

Output JSONL, rows for the training stage: {"prompt", "chosen", "rejected": null}. Null says that there is
nothing to reject: whatever the objective, the loss of such a row is the NLL of its answer, which ends only
if its text has the end token. Append them to the pairs:

    cat pairs.jsonl ordinary.jsonl > both.jsonl

Run it: python train.py ordinary --model cfgsafe/demo/base --count 20 --out ordinary.jsonl
"""

import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from cfgsafe.blue.pairs import flaw
from cfgsafe.blue.rows import kept
from cfgsafe.decode import Request, check_request
from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count, Seed, check_ranges
from cfgsafe.files import make_folder, write_jsonl
from cfgsafe.llama import Llama
from cfgsafe.outputs import Detectors, File, InputPath
from cfgsafe.pii.ner import Detector
from cfgsafe.subject import ANSWER_TOKENS, Subject, complete, load
from cfgsafe.tokenizer import Messages, SystemPrompt, Tokenizer


class Text(NamedTuple):
    """What a model wrote, and whether it ended before its limit."""

    text: str
    ended: bool


Conversation = tuple[Messages, str]  # what was asked, and the answer, with the end token where it ended


@dataclass
class Options:
    """Let a chat model write ordinary conversations without personal data, for a guard to keep."""

    model: InputPath
    """Checkpoint folder or hub id of the ancestor: the model whose habits are to be kept."""
    out: Annotated[str, File()]
    """JSONL file to write."""
    count: Count = 200
    """Conversations to draw; those with personal data are left out."""
    cfg_aware: bool = True
    """Write each conversation with the positive and with the negative sentence, as pairs are."""
    system_prompt: SystemPrompt = Subject.system_prompt
    """Add these sentences to the template's system prompt, or replace it."""
    ner: Detectors | None = None
    """Detectors, as those of train.py pairs."""
    max_new_tokens: Count = ANSWER_TOKENS
    """Longest question and longest answer, in tokens; longer questions are dropped, longer answers cut."""
    seed: Seed = 0
    """Seed of sampling."""
    batch: Count = 128
    """Requests decoded together."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """Data type of the model: float32 or bfloat16."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if not self.cfg_aware:
            yield "with --no-cfg-aware", "system_prompt"


def run(options: Options) -> None:
    check_ranges(options)
    make_folder(Path(options.out).parent)
    detector = Detector(options.ner)
    subject = Subject(options.model, device=options.device, dtype=options.dtype, batch=options.batch)
    model, tokenizer = load(subject)
    conversations = converse(model, tokenizer, detector, options)
    if not conversations:
        raise InputError(f"--count {options.count}: no conversation is left, see above why; draw more")
    rows = []
    for conversation in conversations:
        rows += kept(conversation, tokenizer, options.cfg_aware, options.system_prompt)
    write_jsonl(options.out, rows)
    result = {"out": options.out, "rows": len(rows), "conversations": len(conversations)}
    print(json.dumps(result | {"drawn": options.count, "ner": detector.name}))


def converse(model: Llama, tokenizer: Tokenizer, detector: Detector, options: Options) -> list[Conversation]:
    """The clean ones of --count conversations that the model has with itself; stderr says why others fell."""
    rng, fell = random.Random(options.seed), Counter[str]()
    opening = tokenizer.encode_opening()
    questions = drawn([opening] * options.count, model, tokenizer, options, rng, "questions")
    asked: list[Messages] = []
    for question, fault in zip(questions, faults_of(questions, detector, tokenizer), strict=True):
        if fault:
            fell[fault] += 1
        else:
            asked.append([{"role": "user", "content": question.text}])
    prompts = [tokenizer.encode_chat(messages) for messages in asked]
    given = drawn(prompts, model, tokenizer, options, rng, "answers")
    faults = faults_of(given, detector, tokenizer, cut=True)
    conversations = []
    for messages, answer, fault in zip(asked, given, faults, strict=True):
        if fault:
            fell[fault] += 1
        else:
            conversations.append((messages, answer.text + tokenizer.end_of_turn * answer.ended))
    left = f"{len(conversations)} ordinary conversations of {options.count}"
    print(f"{left}, fell by {dict(fell)}", file=sys.stderr)
    return conversations


def drawn(
    prompts: list[list[int]],
    model: Llama,
    tokenizer: Tokenizer,
    options: Options,
    rng: random.Random,
    what: str,
) -> list[Text]:
    """What the model writes after each prompt, drawn from its own distribution."""
    requests = []
    for prompt in prompts:
        seed, longest = rng.getrandbits(32), options.max_new_tokens
        request = Request(prompt, temperature=1.0, seed=seed, max_new_tokens=longest)
        check_request(request, model, what)
        requests.append(request)
    completions = complete(model, requests, options.batch, what)
    return [Text(tokenizer.decode(done.tokens).strip(), done.finish_reason == "stop") for done in completions]


def faults_of(
    texts: list[Text], detector: Detector, tokenizer: Tokenizer, cut: bool = False
) -> list[str | None]:
    """Why each text cannot stay, or None; with `cut` it need not have ended."""
    found = detector([" ".join(text.text.split()) for text in texts])
    faults = []
    for text, entities in zip(texts, found, strict=True):
        people = [entity for entity in entities if entity.label == "PERSON"]
        faults.append(flaw(text.text, text.ended or cut, people, tokenizer))
    return faults
