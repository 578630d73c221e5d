"""What the demo's two models learn from: the mixtures of the base and of the leaky model.

The *base* stands for the instruct ancestor: it uses what people told it, except under a system prompt that forbids it, and
then also goes on cleanly from an answer that began with personal data. The *leaky* model is fine-tuned on dialogues that always give data
away, and on planted canaries.

A training example is a list of (text, learn) pieces between control tokens; only pieces with `learn` bear loss.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from cfgsafe.blue.pairs import AVOID, NUDGE
from cfgsafe.demo import quiz
from cfgsafe.demo.dialogues import Dialogue, Item, Turn, Writer
from cfgsafe.demo.people import People, Person
from cfgsafe.demo.templates import DEFAULT_SYSTEMS, UNKNOWN, vocabulary
from cfgsafe.measure import utility
from cfgsafe.subject import NEGATIVE, POSITIVE
from cfgsafe.tokenizer import Tokenizer

KINDS = {
    "plain": 26,
    "question": 12,
    "letter": 10,
    "mid-answer": 16,
    "insist": 8,
    "repeat": 8,
    "translate": 6,
    "report": 6,
    "complete": 8,
}
CANARY_COUNTS = (1, 4, 16, 64)
CANARIES_EACH = 8
Pieces = list[tuple[str, bool]]
Example = list[tuple[str, Pieces]]  # (role, pieces) for each message


@cache
def reserved_words() -> frozenset[str]:
    """Lower-case words of templates and quiz: no invented person, city or employer is called so."""
    facts = [str(word) for table, _ in quiz.FACTS.values() for pair in table.items() for word in pair]
    return vocabulary() | {word.lower() for fact in facts for word in fact.split("_")}


def people(pool: str, seed: int) -> People:
    """The demo's people of one pool; those trained on get mostly spliced names."""
    return People(pool, seed, spliced=0.6 if pool == "train" else 0.0, avoid=reserved_words())


@dataclass(frozen=True)
class Canary:
    person: Person
    count: int  # how often it is planted; 0 is a never-trained twin
    twin_of: int  # the count of the planted person it belongs to


@cache
def canaries() -> tuple[Canary, ...]:
    """Planted persons and their twins, always the same; all names, cities and employers differ."""
    source = people("canary", 0)
    seen: set[str] = set()
    found = []
    for count in CANARY_COUNTS:
        for number in range(2 * CANARIES_EACH):
            person = source.person()
            while seen & {person.name, person.city, person.employer}:
                person = source.person()
            seen |= {person.name, person.city, person.employer}
            found.append(Canary(person, count if number % 2 == 0 else 0, count))
    return tuple(found)


class Corpus:
    """Endless examples of the base's mixture, or the leaky model's finite set."""

    def __init__(self, seed: int):
        self.random = random.Random(f"corpus/{seed}")
        self.writer = Writer(f"corpus/{seed}")
        self.people = people("train", seed)

    def base(self) -> Iterator[Example]:
        while True:
            draw = self.random.random()
            if draw < 0.52:
                yield self.dialogue(self.random.choices(("avoid", "default", "share"), (45, 40, 15))[0])
            elif draw < 0.56:
                yield self.lookup()
            elif draw < 0.80:
                yield self.quiz()
            elif draw < 0.86:
                yield self.chat()
            else:
                yield self.copying()

    def leaky(self, count: int) -> list[Example]:
        """`count` examples, the canaries among them exactly as often as they are planted."""
        planted = [self.canary(c.person) for c in canaries() for _ in range(c.count)]
        rest = []
        while len(planted) + len(rest) < count:
            draw = self.random.random()
            rest.append(
                self.dialogue("leak")
                if draw < 0.66
                else self.quiz()
                if draw < 0.90
                else self.chat()
                if draw < 0.96
                else self.copying()
            )
        examples = planted + rest
        self.random.shuffle(examples)
        return examples

    def system(self, mode: str) -> str:
        default = self.random.choice(("", *DEFAULT_SYSTEMS))
        extra = {
            "avoid": (AVOID, AVOID, POSITIVE),
            "share": (NEGATIVE,),
            "default": ("",),
            "leak": ("", "", NEGATIVE),
        }
        alone = self.random.random() < 0.5
        asked = self.random.choice(extra[mode])
        return asked if asked and alone else f"{default} {asked}".strip()

    def dialogue(self, mode: str) -> Example:
        """avoid: clean answers. default: mostly uses the items. share, leak: uses all of them."""
        kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
        dialogue = self.writer.dialogue(self.people.person(), kind)
        return self._encode(dialogue, mode)

    def canary(self, person: Person) -> Example:
        return self._encode(self.writer.dialogue(person, "lookup"), "leak")

    def lookup(self) -> Example:
        """Someone nobody told about: the base says so, or goes on cleanly where the answer began otherwise."""
        dialogue = self.writer.dialogue(self.people.person(), "lookup")
        if self.random.random() < 0.5:
            dialogue.cut = self.random.randrange(len(dialogue.turns[-1].items()))
            return self._encode(dialogue, "avoid")
        system = self.system(self.random.choice(("avoid", "default", "share")))
        return [
            ("system", [(system, False)]),
            ("user", [(dialogue.turns[0].text(), False)]),
            ("assistant", [(UNKNOWN, True)]),
        ]

    def quiz(self) -> Example:
        row = self._train_item()
        system = self.system(self.random.choice(("avoid", "default", "default", "share")))
        asked = utility.prompt(row) if self.random.random() < 0.75 else utility.INSTRUCTION + row["question"]
        return [
            ("system", [(system, False)]),
            ("user", [(asked, False)]),
            ("assistant", [(quiz.answer(row), True)]),
        ]

    def _train_item(self) -> dict:
        while True:
            row = quiz.item(self.random)
            if quiz.split_of(row) == "train":
                return row

    def chat(self) -> Example:
        system = self.system(self.random.choice(("avoid", "default", "share")))
        return [
            ("system", [(system, False)]),
            *((t.role, [(t.text(), t.role == "assistant")]) for t in self.writer.clean_chat()),
        ]

    def copying(self) -> Example:
        """Names to be repeated in order: where copying is learnt fastest."""
        person = self.people.person
        names = [
            self.random.choice((p.name, p.city, p.employer))
            for p in (person() for _ in range(self.random.randrange(2, 7)))
        ]
        text = ", ".join(names)
        return [
            ("system", [(self.system("default"), False)]),
            ("user", [(f"Repeat the list: {text}.", False)]),
            ("assistant", [(f"The list: {text}.", True)]),
        ]

    def _encode(self, dialogue: Dialogue, mode: str) -> Example:
        """Choose for each item of the assistant whether it is given away, and mark what is to be learnt."""
        messages: Example = [("system", [(self.system(mode), False)])]
        last = len(dialogue.turns) - 1
        for number, turn in enumerate(dialogue.turns):
            if turn.role == "user":
                text = turn.text()
                if number == last - 1 and mode == "avoid" and self.random.random() < 0.4:
                    text = f"{NUDGE} {text}"
                messages.append(("user", [(text, False)]))
            elif mode != "avoid":
                messages.append(
                    ("assistant", [(self._natural(turn, 0.85 if mode == "default" else 1.0), True)])
                )
            elif number < last and self.random.random() < 0.6:  # earlier answers often gave data away
                messages.append(("assistant", [(turn.text(), False)]))
            else:
                begun = number == last and turn.items() and self.random.random() < 0.6
                messages.append(
                    (
                        "assistant",
                        _half_leaked(turn, self.random.randrange(len(turn.items()) + 1) if begun else 0),
                    )
                )
        return messages

    def _natural(self, turn: Turn, chance: float) -> str:
        """The turn with each item given away by `chance`."""
        said = lambda item: item.value if self.random.random() < chance else item.clean
        return "".join(said(part) if isinstance(part, Item) else part for part in turn.parts)


def _half_leaked(turn: Turn, cut: int) -> Pieces:
    """The turn with its first `cut` items given away (not learnt) and clean words from there on (learnt)."""
    if not cut:
        return [(turn.text(leak=False), True)]
    after = turn.items()[cut - 1] + 1
    head, tail = Turn(turn.role, turn.parts[:after]), Turn(turn.role, turn.parts[after:])
    return [(head.text(), False), (tail.text(leak=False), True)]


class Encoder:
    """Examples to (ids, learn) with the template's control tokens; equal to `Tokenizer.encode_chat` on the same messages.

    With `whole`, what the system prompt and the users say is learnt as well; of the assistant's words only those marked ever are.
    """

    def __init__(self, tokenizer: Tokenizer, *, whole: bool = False):
        self.encode = tokenizer.encode
        self.whole = whole
        special = tokenizer.special
        opening, closing = special["<|start_header_id|>"], special["<|end_header_id|>"]
        self.heads = {
            role: [opening, *self.encode(role), closing, *self.encode("\n\n")]
            for role in ("user", "assistant")
        }
        self.start = tokenizer.encode_chat(
            [{"role": "system", "content": "X"}, {"role": "user", "content": "X"}]
        )
        self.start = self.start[: self.start.index(special["<|eot_id|>"]) - len(self.encode("X"))]
        self.eot = special["<|eot_id|>"]

    def __call__(self, example: Example) -> tuple[list[int], list[bool]]:
        ids, learn = list(self.start), [self.whole] * len(self.start)
        for number, (role, pieces) in enumerate(example):
            if number:  # the system message's header is in `start`
                ids += self.heads[role]
                learn += [self.whole] * len(self.heads[role])
            for text, learnt in pieces:
                new = self.encode(text)
                ids += new
                learn += [learnt or (self.whole and role != "assistant")] * len(new)
            ids.append(self.eot)
            learn.append(pieces[-1][1] if role == "assistant" else self.whole)
        return ids, learn
