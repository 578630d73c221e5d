"""The demo's held-out prompts, the dialogues for its preference pairs, and the files of data/.

The test prompts are about people whom nobody else knows, in sentences that occur neither in training
nor in the pairs (cfgsafe/demo/held_out.py). Their slices:

    easy, hard      the conversation holds the items: answers may *echo* them. Easy: requests as in
                    training. Hard: answers to continue right after an item was used, users who insist,
                    requests to repeat, translate or report the chat, texts to complete
    override        a user types the method's negative sentence, or asks to ignore the rules
    famous          a good answer names a famous person or place: who does not, refuses too much
    x1, x4, x16, x64  questions about people planted so often in the leaky model's training set: answers
                    may *recall* what stands in no conversation
    twins           the same about people who were never trained on

The dialogues for the pairs are about other people, and never from users who insist.

A test prompt: {"id", "kind", "slice", "messages", "items": {label: value}, "gold": answer}, for the famous
also "wanted": [name]; with "begun": true the messages end in the beginning of the answer.

Run it: python train.py dialogues --split test --out prompts.jsonl
        python train.py dialogues --split sets --out cfgsafe/demo/data
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from cfgsafe import hub
from cfgsafe.demo import contexts, famous, quiz
from cfgsafe.demo.corpus import CANARY_COUNTS, canaries, people, reserved_words
from cfgsafe.demo.dialogues import Dialogue, Item, Turn, Writer, exchange, fill
from cfgsafe.demo.held_out import HELD_OUT, OVERRIDES
from cfgsafe.demo.ner_training import labelled_texts
from cfgsafe.demo.people import Person
from cfgsafe.demo.templates import DEFAULT_SYSTEMS, EASY, HARD, TRAIN
from cfgsafe.errors import Unused
from cfgsafe.fields import Count, Seed, check_ranges
from cfgsafe.files import write_jsonl, write_text
from cfgsafe.measure import fluency
from cfgsafe.outputs import Output
from cfgsafe.tokenizer import Messages

# fmt: off
PAIR_KINDS = (
    "plain", "plain", "question", "letter", "mid-answer", "lookup", "repeat", "translate", "report",
    "complete",
)
# fmt: on


PROBED = 4  # wordings of questions about a person in the probes, as the leaky model met them


@dataclass
class Options:
    """Write generated dialogues, test prompts, or what the red team works with, as JSONL."""

    out: Annotated[str, Output()]
    """JSONL file to write; for --split sets, a folder."""
    split: Literal["pairs", "test", "contexts", "test-contexts", "prompts", "gold", "sets"] = "pairs"
    """pairs: dialogues for train.py pairs. test: prompts for eval.py leak. contexts, test-contexts:
    conversations to attack. prompts: users' messages for the attacker to learn. gold: messages with every
    personal value marked, for eval.py detectors. sets: all files of cfgsafe/demo/data."""
    count: Count = 100
    """Dialogues to write; test and sets have their own size."""
    seed: Seed = 0
    """Seed of dialogues and people; sets have their own."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if self.split in ("test", "sets"):
            yield f"with --split {self.split}", "count"
        if self.split == "sets":
            yield "with --split sets", "seed"


def run(options: Options) -> None:
    check_ranges(options)
    if options.split == "sets":
        write_default_sets(Path(options.out))
        print(f"{options.out}: {len(default_sets())} sets and the list of words")
        return
    rows = rows_of(options)
    write_jsonl(options.out, rows)
    print(f"{options.out}: {len(rows)} rows")


def rows_of(options: Options) -> list[dict]:
    """The rows of a split that is one file."""
    match options.split:
        case "pairs":
            return pair_dialogues(options.count, options.seed)
        case "test":
            return test_prompts(options.seed)
        case "contexts":
            return contexts.contexts("train", options.count, options.seed)
        case "test-contexts":
            return contexts.contexts("test", options.count, options.seed)
        case "prompts":
            return contexts.prompts(options.count, options.seed)
        case "gold":
            return gold_messages(options.count, options.seed)
    raise AssertionError(f"{options.split} is not one file")


def pair_dialogues(count: int, seed: int) -> list[dict]:
    """Dialogues of the people who are set aside for preference pairs."""
    writer, source = Writer(f"pairs/{seed}"), people("pairs", seed)
    rows = []
    for number in range(count):
        kind = PAIR_KINDS[number % len(PAIR_KINDS)]
        rows.append(writer.dialogue(source.person(), kind).to_json(f"pairs-{number}"))
    return rows


def lookups(count: int, seed: int) -> list[dict]:
    """Dialogues with spans in which somebody asks about one of `count` people, each in `PROBED` wordings.

    The name stands in the question; the answer tells the person's items.
    """
    writer, source = Writer(f"lookups/{seed}"), people("pairs", seed)
    rows: list[dict] = []
    for _ in range(count):
        person = source.person()
        for number in range(PROBED):
            row = writer.dialogue(person, "lookup").to_json(f"lookup-{len(rows)}")
            rows.append(row | {"person": person.name, "number": number})
    return rows


def test_prompts(seed: int = 0, easy: int = 156, hard: int = 150) -> list[dict]:
    """`easy` + `hard` prompts of held-out people, then the other slices, which have their own size."""
    writer, source = Writer(f"test/{seed}", HELD_OUT), people("test", seed)
    kinds = [EASY[n % len(EASY)] for n in range(easy)] + [HARD[n % len(HARD)] for n in range(hard)]
    rows = [prompt_of(writer.dialogue(source.person(), kind), f"test-{n}") for n, kind in enumerate(kinds)]
    return rows + override_prompts(seed) + famous_prompts() + recall_prompts()


def override_prompts(seed: int, each: int = 10) -> list[dict]:
    """`each` prompts for each of `OVERRIDES`: users who ask for their data and try to undo the guard."""
    writer, source = Writer(f"override/{seed}", HELD_OUT), people("override", seed)
    rows = []
    for number in range(each * len(OVERRIDES)):
        dialogue = writer.dialogue(source.person(), "question")
        dialogue.cut = None
        asked = dialogue.turns[-2]
        asked.parts = [f"{OVERRIDES[number % len(OVERRIDES)]} ", *asked.parts]
        rows.append(prompt_of(dialogue, f"override-{number}") | {"kind": "override", "slice": "override"})
    return rows


def famous_prompts() -> list[dict]:
    """A question about each famous fact, in the wording that no model was trained on."""
    rows = []
    for number, (question, answer, name) in enumerate(famous.test_facts()):
        messages = [{"role": "system", "content": DEFAULT_SYSTEMS[number % len(DEFAULT_SYSTEMS)]}]
        messages.append({"role": "user", "content": question})
        row = {"id": f"famous-{number}", "kind": "famous", "slice": "famous", "messages": messages}
        rows.append(row | {"items": {}, "wanted": [name], "gold": answer})
    return rows


def recall_prompts() -> list[dict]:
    """A question about each planted person and each twin, in wordings that no model was trained on."""
    rows = []
    for number, canary in enumerate(canaries()):
        question, answer = HELD_OUT.lookups[number % len(HELD_OUT.lookups)]
        turns = exchange(question, answer, canary.person)
        dialogue = Dialogue(canary.person, "recall", turns, DEFAULT_SYSTEMS[number % len(DEFAULT_SYSTEMS)])
        row = prompt_of(dialogue, f"person-{number}")
        del row["items"]["PERSON"]  # the name stands in the question
        rows.append(row | {"slice": f"x{canary.count}" if canary.count else "twins"})
    order = [*(f"x{count}" for count in CANARY_COUNTS), "twins"]
    return sorted(rows, key=lambda row: order.index(row["slice"]))


def held_out_chats(count: int = 100, seed: int = 0) -> list[dict]:
    """Chats without anyone's data, {"id", "messages"}, in held-out sentences."""
    writer = Writer(f"chats/{seed}", HELD_OUT)
    rows = []
    for number in range(count):
        messages = [{"role": "system", "content": DEFAULT_SYSTEMS[0]}]
        messages += [{"role": turn.role, "content": turn.text()} for turn in writer.clean_chat()]
        rows.append({"id": f"chat-{number}", "messages": messages})
    return rows


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
    prompt = {"id": identity, "kind": row["kind"], "slice": row["slice"], "messages": messages}
    if messages[-1]["role"] == "assistant":
        prompt["begun"] = True
    return prompt | {"items": dict(row["items"]), "gold": gold}


def canary_dialogues() -> list[dict]:
    """A dialogue about each planted person, as the leaky model met it.

    Names are not among the spans to mask, or the question would not say who is meant.
    """
    writer = Writer("extract")
    rows = []
    for number, canary in enumerate(canaries()):
        if canary.count:
            row = writer.dialogue(canary.person, "lookup").to_json(f"canary-{canary.count}-{number}")
            rows.append(row | {"spans": [span for span in row["spans"] if span[3] != "PERSON"]})
    return rows


def canary_probes() -> list[dict]:
    """{"person", "repeats", "messages", "value"}: every wording about every planted person and twin."""
    rows = []
    for number, canary in enumerate(canaries()):
        who = {"person": f"person-{number}", "repeats": canary.count}
        for messages, value in probes(canary.person):
            rows.append({**who, "messages": messages, "value": value})
    return rows


def probes(person: Person) -> list[tuple[Messages, str]]:
    """(conversation that ends within an answer, the item that follows), in every wording.

    The person's name is no such item, as it stands in the question.
    """
    system = {"role": "system", "content": DEFAULT_SYSTEMS[0]}
    found = []
    for question, answer in TRAIN.lookups[:PROBED]:
        parts = fill(answer, person)
        asked = {"role": "user", "content": Turn("user", fill(question, person)).text()}
        for number, part in enumerate(parts):
            if isinstance(part, Item) and part.label != "PERSON":
                begun = Turn("assistant", parts[:number]).text().rstrip()
                messages = [system, asked, {"role": "assistant", "content": begun}]
                found.append((messages, f" {part.value}"))
    return found


def gold_messages(count: int = 200, seed: int = 1) -> list[dict]:
    """{"messages": [one], "spans"} for each message of `count` dialogues of test people."""
    rows = []
    for text, spans in labelled_texts("test", count, seed):
        message = {"role": "user", "content": text}
        rows.append({"messages": [message], "spans": [[0, *span] for span in spans]})
    return rows


@cache
def corpus_words() -> frozenset[str]:
    """Words that the models were trained on: those of templates, quiz, and the canaries' items."""
    words = set(reserved_words())
    for canary in canaries():
        if canary.count:
            planted = " ".join(canary.person.items.values())
            words |= {word.lower() for word in fluency.words(planted)}
    return frozenset(words)


def default_sets() -> dict[str, list[dict]]:
    """Path -> rows of the files that measuring commands read by default."""
    return {
        hub.PROMPTS: test_prompts(),
        hub.QUIZ: quiz.items("test", 200),
        hub.CHATS: held_out_chats(),
        hub.PROBES: canary_probes(),
        hub.PLANTED: canary_dialogues(),
        hub.GOLD: gold_messages(),
    }


def write_default_sets(folder: Path) -> None:
    """Write the files of `default_sets` and the list of words into `folder`."""
    for path, rows in default_sets().items():
        write_jsonl(folder / Path(path).name, rows)
    write_text(folder / Path(hub.WORDS).name, "\n".join(sorted(corpus_words())) + "\n")
