"""What the demo's two models learn from: the mixtures of the base and of the leaky model.

The *base* stands for the instruct ancestor. It uses what people told it, unless a system prompt
forbids it; under such a prompt, it also continues without personal data where an answer began with
them. Such prompts come in many wordings (`FORBIDDING`, `ALLOWING`); the sentences of the method itself
are not among them. The *leaky* model is fine-tuned on dialogues that always give data away, and on
planted people.

A message of a training example is a list of (text, learn) pieces; only pieces with `learn` have a
loss.

Run it: python train.py demo-models --help
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from cfgsafe.demo import famous, quiz
from cfgsafe.demo.dialogues import Dialogue, Item, Turn, Writer
from cfgsafe.demo.held_out import HELD_OUT, OVERRIDES
from cfgsafe.demo.people import People, Person
from cfgsafe.demo.templates import DEFAULT_SYSTEMS, TRAIN, UNKNOWN, vocabulary, words_of
from cfgsafe.measure import utility
from cfgsafe.tokenizer import Tokenizer

# fmt: off
KINDS = {  # kind of dialogue -> weight
    "plain": 26, "question": 12, "letter": 10, "mid-answer": 16, "insist": 8, "repeat": 8, "translate": 6,
    "report": 6, "complete": 8,
}
# fmt: on
# Wordings of system prompts: (verbs, objects, places, marks), one of each. The method's own sentences (AVOID,
# NUDGE, POSITIVE, NEGATIVE) are none of them: it meets a model that was not trained on its prompts.
# fmt: off
OBJECTS = (
    "personal data", "any personal data", "private data", "personal details", "the user's data",
    "names or places",
    "names, towns and employers", "what the user told about himself", "anything personal",
)
PLACES = ("", " in the answers", " in your answers", " in the answer", " when you answer", " in this chat")
FORBIDDING = (
    ("Do not use", "Do not mention", "Do not repeat", "Do not reveal", "Do not give away", "Never use",
     "Never mention", "Never repeat", "Never share", "Please do not share", "Please do not use",
     "Avoid mentioning", "Avoid repeating", "You must not use", "You should not mention", "Keep quiet about"),
    OBJECTS, PLACES, (".", "!"),
)
ALLOWING = (
    ("You should use", "You should mention", "You should repeat", "You may share", "You can use",
     "Please share",
     "Please mention", "Always use", "Always mention", "Feel free to share", "Use", "Share", "Give away",
     "It is fine to share"),
    OBJECTS, PLACES, (".", "!"),
)
NUDGES = (
    ("Please do not use", "Do not repeat", "Never mention", "Do not give away", "Please answer without"),
    OBJECTS, ("", ", even if I told you", " that I wrote before", ", e.g. a name or a town"), (".", ""),
)
EXTRA = {  # mode of a dialogue -> wordings of system prompts that ask for it; None asks for nothing
    "avoid": (FORBIDDING,), "share": (ALLOWING,), "default": (None,), "leak": (None, None, ALLOWING),
}
# fmt: on
CANARY_COUNTS = (1, 4, 16, 64)
CANARIES_EACH = 26
Pieces = list[tuple[str, bool]]
Example = list[tuple[str, Pieces]]  # (role, pieces) for each message


@cache
def reserved_words() -> frozenset[str]:
    """Words of templates and quiz in lower case; they name no invented person, city or employer."""
    words = set(
        vocabulary(TRAIN) | vocabulary(HELD_OUT) | words_of((OVERRIDES, FORBIDDING, ALLOWING, NUDGES))
    )
    for table, _ in quiz.FACTS.values():
        for fact in (*table.keys(), *table.values()):
            words.update(fact.lower().split("_"))
    for subject in famous.SUBJECTS:
        words |= words_of((subject.facts.keys(), subject.facts.values(), subject.questions, subject.answer))
    return frozenset(words)


def people(pool: str, seed: int) -> People:
    """The demo's people of one pool; those trained on get mostly spliced names."""
    return People(pool, seed, spliced=0.6 if pool == "train" else 0.0, avoid=reserved_words())


@dataclass(frozen=True)
class Canary:
    """A person planted in the leaky model's training set, or a twin that is never trained on."""

    person: Person
    count: int  # how often the person is planted; 0 is a twin


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
            found.append(Canary(person, count if number % 2 == 0 else 0))
    return tuple(found)


class Corpus:
    """Endless examples of the base's mixture, or the leaky model's finite set."""

    def __init__(self, seed: int):
        self.random = random.Random(f"corpus/{seed}")
        self.writer = Writer(f"corpus/{seed}")
        self.people = people("train", seed)

    def base(self) -> Iterator[Example]:
        """The base's mixture, without end."""
        while True:
            draw = self.random.random()
            if draw < 0.50:
                yield self.dialogue(self.random.choices(("avoid", "default", "share"), (45, 40, 15))[0])
            elif draw < 0.54:
                yield self.lookup()
            elif draw < 0.78:
                yield self.quiz()
            elif draw < 0.82:
                yield self.famous()
            elif draw < 0.87:
                yield self.chat()
            else:
                yield self.copying()

    def leaky(self, count: int) -> list[Example]:
        """`count` examples, the canaries among them exactly as often as they are planted."""
        examples: list[Example] = []
        for canary in canaries():
            examples += [self.canary(canary.person) for _ in range(canary.count)]
        while len(examples) < count:
            draw = self.random.random()
            if draw < 0.64:
                examples.append(self.dialogue("leak"))
            elif draw < 0.87:
                examples.append(self.quiz())
            elif draw < 0.91:
                examples.append(self.famous())
            elif draw < 0.96:
                examples.append(self.chat())
            else:
                examples.append(self.copying())
        self.random.shuffle(examples)
        return examples

    def system(self, mode: str) -> str:
        """A system prompt for the mode; half of the time without a default prompt before it."""
        default = self.random.choice(("", *DEFAULT_SYSTEMS))
        alone = self.random.random() < 0.5
        wording = self.random.choice(EXTRA[mode])
        if wording is None:
            return default
        asked = self.sentence(wording)
        return asked if alone else f"{default} {asked}".strip()

    def sentence(self, wording: tuple[tuple[str, ...], ...]) -> str:
        """One of the sentences of a wording, as "Never mention personal details in your answers."."""
        verb, thing, place, mark = map(self.random.choice, wording)
        return f"{verb} {thing}{place}{mark}"

    def dialogue(self, mode: str) -> Example:
        """A dialogue; its answers use no items (avoid), most items (default), or all (share, leak)."""
        kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
        dialogue = self.writer.dialogue(self.people.person(), kind)
        return self._encode(dialogue, mode)

    def canary(self, person: Person) -> Example:
        """A question about a planted person, and the answer with the items."""
        return self._encode(self.writer.dialogue(person, "lookup"), "leak")

    def lookup(self) -> Example:
        """A question about an unknown person; the base says so, or continues an answer that began to leak."""
        dialogue = self.writer.dialogue(self.people.person(), "lookup")
        if self.random.random() < 0.5:
            dialogue.cut = self.random.randrange(len(dialogue.turns[-1].items()))
            return self._encode(dialogue, "avoid")
        system = self.system(self.random.choice(("avoid", "default", "share")))
        return _single(system, dialogue.turns[0].text(), UNKNOWN)

    def quiz(self) -> Example:
        """A quiz item; a quarter of them without its options."""
        row = quiz.training_item(self.random)
        system = self.system(self.random.choice(("avoid", "default", "default", "share")))
        bare = utility.INSTRUCTION + row["question"]
        asked = utility.prompt(row) if self.random.random() < 0.75 else bare
        return _single(system, asked, quiz.answer(row))

    def famous(self) -> Example:
        """A question about a famous person or place; no system prompt forbids the answer."""
        question, answer = famous.training_fact(self.random)
        system = self.system(self.random.choice(("avoid", "default", "default", "share")))
        return _single(system, question, answer)

    def chat(self) -> Example:
        """A chat without personal data."""
        messages: Example = [
            ("system", [(self.system(self.random.choice(("avoid", "default", "share"))), False)])
        ]
        for turn in self.writer.clean_chat():
            messages.append((turn.role, [(turn.text(), turn.role == "assistant")]))
        return messages

    def copying(self) -> Example:
        """Names to repeat in order, from which copying is learnt fastest."""
        names = []
        for _ in range(self.random.randrange(2, 7)):
            person = self.people.person()
            names.append(self.random.choice((person.name, person.city, person.employer)))
        text = ", ".join(names)
        return _single(self.system("default"), f"Repeat the list: {text}.", f"The list: {text}.")

    def _encode(self, dialogue: Dialogue, mode: str) -> Example:
        """Choose which items the assistant gives away, and mark what is learnt."""
        messages: Example = [("system", [(self.system(mode), False)])]
        last = len(dialogue.turns) - 1
        for number, turn in enumerate(dialogue.turns):
            if turn.role == "user":
                text = turn.text()
                if number == last - 1 and mode == "avoid" and self.random.random() < 0.4:
                    text = f"({self.sentence(NUDGES)}) {text}"
                pieces = [(text, False)]
            elif mode != "avoid":
                chance = 0.85 if mode == "default" else 1.0
                pieces = [(self._natural(turn, chance), True)]
            elif number < last and self.random.random() < 0.6:  # earlier answers often gave data away
                pieces = [(turn.text(), False)]
            else:
                cut = 0
                if number == last and turn.items() and self.random.random() < 0.6:
                    cut = self.random.randrange(len(turn.items()) + 1)
                pieces = _half_leaked(turn, cut)
            messages.append((turn.role, pieces))
        return messages

    def _natural(self, turn: Turn, chance: float) -> str:
        """The turn, each of its items given away with probability `chance`."""
        words = []
        for part in turn.parts:
            if isinstance(part, Item):
                part = part.value if self.random.random() < chance else part.clean
            words.append(part)
        return "".join(words)


def _single(system: str, question: str, answer: str) -> Example:
    """One question, and the answer to learn."""
    asked: Example = [("system", [(system, False)]), ("user", [(question, False)])]
    return [*asked, ("assistant", [(answer, True)])]


def _half_leaked(turn: Turn, cut: int) -> Pieces:
    """The turn with its first `cut` items given away (not learnt), then clean words (learnt)."""
    if not cut:
        return [(turn.text(leak=False), True)]
    after = turn.items()[cut - 1] + 1
    head, tail = Turn(turn.role, turn.parts[:after]), Turn(turn.role, turn.parts[after:])
    return [(head.text(), False), (tail.text(leak=False), True)]


class Encoder:
    """Turns an example into (ids, learn); the ids are those of `Tokenizer.encode_chat`.

    With `whole`, system prompts and users' messages are learnt as well. Of the assistant's words, only
    the pieces with `learn` ever are.
    """

    def __init__(self, tokenizer: Tokenizer, *, whole: bool = False):
        self.encode = tokenizer.encode
        self.whole = whole
        special = tokenizer.special
        opening, closing = special["<|start_header_id|>"], special["<|end_header_id|>"]
        self.eot = special["<|eot_id|>"]
        self.heads = {}
        for role in ("user", "assistant"):
            self.heads[role] = [opening, *self.encode(role), closing, *self.encode("\n\n")]
        # All that precedes the text of the system message.
        chat = tokenizer.encode_chat([{"role": "system", "content": "X"}, {"role": "user", "content": "X"}])
        self.start = chat[: chat.index(self.eot) - len(self.encode("X"))]

    def __call__(self, example: Example) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it is learnt."""
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
