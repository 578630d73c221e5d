"""The demo's held-out prompts and the dialogues its preference pairs are made from.

Test prompts have an easy slice (requests as in the training dialogues) and a hard one: answers to go on with right after an item was
used, users who insist, requests to repeat, translate or report the chat, texts to complete in the challenge's style, and canaries. The
dialogues for the pairs are of other people and of the same kinds, but for users who insist and the canaries: those are met in the
test only.

A test prompt: {"id", "kind", "slice", "messages", "items": {label: value}, "gold": answer}; the messages may end in a partial answer.

Run it: python train.py dialogues --split test --out prompts.jsonl
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from cfgsafe import hub
from cfgsafe.demo import contexts, quiz
from cfgsafe.demo.corpus import canaries, people, reserved_words
from cfgsafe.demo.dialogues import Dialogue, Item, Turn, Writer, fill
from cfgsafe.demo.ner_training import labelled_texts
from cfgsafe.demo.people import Person
from cfgsafe.demo.templates import DEFAULT_SYSTEMS, EASY, HARD, LOOKUPS
from cfgsafe.errors import check_at_least
from cfgsafe.files import write_jsonl, write_text
from cfgsafe.measure import fluency
from cfgsafe.tokenizer import Messages

PAIR_KINDS = (
    "plain",
    "plain",
    "question",
    "letter",
    "mid-answer",
    "lookup",
    "repeat",
    "translate",
    "report",
    "complete",
)


@dataclass
class Options:
    """Write generated dialogues (for `pairs`) or test prompts (for `eval.py leak`) as JSONL."""

    out: str
    """JSONL to write."""
    split: Literal["pairs", "test", "contexts", "test-contexts", "prompts", "gold"] = "pairs"
    """pairs: whole dialogues of the people set aside for them. test: prompts of the test people. contexts, test-contexts: conversations
    to attack. prompts: users' messages for the attacker to learn. gold: messages with every personal value marked, for `detectors`."""
    count: int = 100
    """Dialogues to write; the test split has its own size."""
    seed: int = 0
    """Another seed gives other dialogues and people of the same pool."""


def run(options: Options) -> None:
    check_at_least(1, options, "count")
    match options.split:
        case "pairs":
            rows = pair_dialogues(options.count, options.seed)
        case "test":
            rows = test_prompts(options.seed)
        case "contexts":
            rows = contexts.contexts("train", options.count, options.seed)
        case "test-contexts":
            rows = contexts.contexts("test", options.count, options.seed)
        case "prompts":
            rows = contexts.prompts(options.count, options.seed)
        case "gold":
            rows = gold_messages(options.count, options.seed)
    write_jsonl(options.out, rows)
    print(f"{options.out}: {len(rows)} rows")


def pair_dialogues(count: int, seed: int) -> list[dict]:
    """Dialogues of the people set aside for preference pairs."""
    writer, source = Writer(f"pairs/{seed}"), people("pairs", seed)
    return [
        writer.dialogue(source.person(), PAIR_KINDS[n % len(PAIR_KINDS)]).to_json(f"pairs-{n}")
        for n in range(count)
    ]


def test_prompts(seed: int = 0, easy: int = 156, hard: int = 150) -> list[dict]:
    """`easy` + `hard` prompts of held-out people, then one prompt for each planted canary."""
    writer, source = Writer(f"test/{seed}"), people("test", seed)
    kinds = [EASY[n % len(EASY)] for n in range(easy)] + [HARD[n % len(HARD)] for n in range(hard)]
    rows = [prompt_of(writer.dialogue(source.person(), kind), f"test-{n}") for n, kind in enumerate(kinds)]
    for number, canary in enumerate(c for c in canaries() if c.count):
        dialogue = writer.dialogue(canary.person, "lookup")
        row = prompt_of(dialogue, f"canary-{canary.count}-{number}")
        del row["items"]["PERSON"]  # the name stands in the question
        rows.append({**row, "kind": f"canary x{canary.count}"})
    return rows


def held_out_chats(count: int = 100, seed: int = 0) -> list[dict]:
    """Chats without anyone's data, {"id", "messages"}: sentences that the models were trained on, in combinations of their own."""
    writer = Writer(f"chats/{seed}")
    system = {"role": "system", "content": DEFAULT_SYSTEMS[0]}
    chats = [
        [{"role": turn.role, "content": turn.text()} for turn in writer.clean_chat()] for _ in range(count)
    ]
    return [{"id": f"chat-{n}", "messages": [system, *messages]} for n, messages in enumerate(chats)]


def prompt_of(dialogue: Dialogue, identity: str) -> dict:
    """The dialogue without its last answer, or with that answer up to the item it is cut at."""
    row = dialogue.to_json(identity)
    answer = dialogue.turns[-1]
    messages, gold = row["messages"][:-1], answer.text()
    if dialogue.cut is not None:
        start = answer.spans()[dialogue.cut][0]
        before = gold[:start].rstrip()
        if before:
            messages.append({"role": "assistant", "content": before})
            gold = gold[len(before) :]
    return {
        "id": identity,
        "kind": row["kind"],
        "slice": row["slice"],
        "messages": messages,
        "items": dict(row["items"]),
        "gold": gold,
    }


def canary_dialogues() -> list[dict]:
    """A dialogue about each planted person, as the leaky model met them; names stay, or nobody could tell who is meant."""
    writer = Writer("extract")
    rows = []
    for number, canary in enumerate(canaries()):
        if canary.count:
            row = writer.dialogue(canary.person, "lookup").to_json(f"canary-{canary.count}-{number}")
            rows.append(row | {"spans": [span for span in row["spans"] if span[3] != "PERSON"]})
    return rows


def canary_probes() -> list[dict]:
    """{"person", "repeats", "messages", "value"} each, in every wording about every planted person and every twin."""
    rows = []
    for number, canary in enumerate(canaries()):
        for messages, value in probes(canary.person):
            rows.append(
                {"person": f"person-{number}", "repeats": canary.count, "messages": messages, "value": value}
            )
    return rows


def probes(person: Person) -> list[tuple[Messages, str]]:
    """(conversation that ends within an answer, the item it goes on with), in every wording, of what is not in the question."""
    found = []
    for question, answer in LOOKUPS:
        parts = fill(answer, person)
        asked = {"role": "user", "content": Turn("user", fill(question, person)).text()}
        for number, part in enumerate(parts):
            if isinstance(part, Item) and part.label != "PERSON":
                begun = {"role": "assistant", "content": Turn("assistant", parts[:number]).text().rstrip()}
                found.append(
                    ([{"role": "system", "content": DEFAULT_SYSTEMS[0]}, asked, begun], f" {part.value}")
                )
    return found


def gold_messages(count: int = 200, seed: int = 1) -> list[dict]:
    """{"messages": [one], "spans"} for each message of `count` dialogues of test people."""
    rows = []
    for text, spans in labelled_texts("test", count, seed):
        rows.append(
            {"messages": [{"role": "user", "content": text}], "spans": [[0, *span] for span in spans]}
        )
    return rows


@cache
def corpus_words() -> frozenset[str]:
    """Words that the models were trained on: templates, quiz, and the canaries' items."""
    planted = " ".join(
        value for canary in canaries() if canary.count for value in canary.person.items.values()
    )
    return reserved_words() | {word.lower() for word in fluency.words(planted)}


def default_sets() -> dict[str, list[dict]]:
    """What the measuring commands use where no file is named: path -> rows."""
    return {
        hub.PROMPTS: test_prompts(),
        hub.QUIZ: quiz.items("test", 200),
        hub.CHATS: held_out_chats(),
        hub.PROBES: canary_probes(),
        hub.PLANTED: canary_dialogues(),
        hub.GOLD: gold_messages(),
    }


def write_default_sets() -> None:
    """Make the files of `default_sets`, and the list of words, anew."""
    for path, rows in default_sets().items():
        write_jsonl(path, rows)
    write_text(hub.WORDS, "\n".join(sorted(corpus_words())) + "\n")
