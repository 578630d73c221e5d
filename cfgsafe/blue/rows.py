"""The rows of a file of pairs: a sample and its chosen side, rendered with the checkpoint's chat template.

Source: Smirnov (arXiv 2412.06846). CFG-aware: each pair is written twice, as it is with the positive
sentence at the end of the system prompt, and with the sides swapped with the negative one.
Deviations: the swapped half may have another weight, or be left out. Personal values of the assistant in
the prompt may be replaced by [LABEL], as in the scrubbed dialogues of the LLM Privacy Challenge, because
the NLL of ORPO is also taken over the prompt. Both sides stay as they were.

Run it: python train.py pairs --dialogues D.jsonl --model cfgsafe/demo/base --out pairs.jsonl --earlier scrub
"""

from dataclasses import replace
from typing import Any

from cfgsafe.errors import at
from cfgsafe.pii.dialogues import Sample
from cfgsafe.pii.entities import Entity, merge
from cfgsafe.pii.matching import places
from cfgsafe.subject import NEGATIVE, POSITIVE
from cfgsafe.tokenizer import ADD, Messages, SystemPrompt, Tokenizer, with_system

Pair = tuple[Sample, str]  # a sample and its chosen side


def plain(pair: Pair, tokenizer: Tokenizer) -> dict[str, Any]:
    """The pair under the dialogue's own system prompt."""
    sample, chosen = pair
    end = tokenizer.end_of_turn
    with at(sample.place):
        prompt = tokenizer.render_chat(sample.messages)
    return {"prompt": prompt, "chosen": chosen + end, "rejected": sample.rejected + end}


def cfg_aware(
    pair: Pair, tokenizer: Tokenizer, system_prompt: SystemPrompt = ADD, swapped: float = 1.0
) -> list[dict[str, Any]]:
    """The pair with the positive sentence in its system prompt, and swapped with the negative one.

    `swapped` is the weight of the second row; 0 leaves it out.
    """
    sample, chosen = pair
    positive = replace(sample, messages=with_system(sample.messages, POSITIVE, system_prompt))
    rows = [plain((positive, chosen), tokenizer)]
    if swapped:
        negative = replace(sample, messages=with_system(sample.messages, NEGATIVE, system_prompt))
        row = plain((negative, chosen), tokenizer)
        weight = {} if swapped == 1 else {"weight": swapped}
        rows.append(row | {"chosen": row["rejected"], "rejected": row["chosen"]} | weight)
    return rows


def kept(
    conversation: tuple[Messages, str],
    tokenizer: Tokenizer,
    cfg_aware: bool,
    system_prompt: SystemPrompt = ADD,
) -> list[dict[str, Any]]:
    """Rows whose answer is only to be kept: one, or CFG-aware one with each sentence in the system prompt.

    The answer has the end token where it ended.
    Where the answer is the same under both sentences, guidance moves nothing.
    """
    messages, answer = conversation
    several = [messages]
    if cfg_aware:
        several = [with_system(messages, sentence, system_prompt) for sentence in (POSITIVE, NEGATIVE)]
    rows = []
    for chat in several:
        rows.append({"prompt": tokenizer.render_chat(chat), "chosen": answer, "rejected": None})
    return rows


def scrubbed(sample: Sample) -> Sample:
    """The sample with [LABEL] for each personal value in the assistant's turns of its prompt.

    Values are those of the sample's spans, in any turn and in the rest of the answer, wherever they stand
    again (cfgsafe/pii/matching.py).

    >>> chat = [{"role": "user", "content": "I am Ann."}, {"role": "assistant", "content": "Hi Ann, of"}]
    >>> scrubbed(Sample(chat, " Leeds.", "f:1", (("GPE", "Leeds"),), ((0, 5, 8, "PERSON"),))).messages[1]
    {'role': 'assistant', 'content': 'Hi [PERSON], of'}
    """
    values = set(sample.values)
    for number, start, end, label in sample.said:
        values.add((label, sample.messages[number]["content"][start:end]))
    messages: Messages = []
    for number, message in enumerate(sample.messages):
        text = message["content"]
        finds = [Entity(a, b, label, text[a:b]) for n, a, b, label in sample.said if n == number]
        for label, value in sorted(values):
            finds += [Entity(a, b, label, text[a:b]) for a, b in places(text, label, value, bare=True)]
        if message["role"] == "assistant":
            text = with_placeholders(text, merge(text, [finds]))
        messages.append({**message, "content": text})
    return replace(sample, messages=messages)


def with_placeholders(text: str, entities: list[Entity]) -> str:
    """The text with [LABEL] for each entity; they do not overlap."""
    for entity in sorted(entities, key=_start, reverse=True):
        text = f"{text[: entity.start]}[{entity.label}]{text[entity.end :]}"
    return text


def _start(entity: Entity) -> int:
    return entity.start
