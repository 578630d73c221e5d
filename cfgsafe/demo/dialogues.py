"""A seeded generator of chats in which people give away personal data and an assistant uses it.

A turn is a list of parts: plain strings, and `Item`s, which hold the personal value and the words
that stand there if the assistant keeps the value to itself. So one composition gives the leaking
answer, the clean one, every half-leaked prefix of it, and exact gold spans. Dialogues are composed
from introductions x requests x topics x answer sentences; `count_templates()` in
cfgsafe/demo/templates.py says how many there are.

Dialogues are written as JSONL: {"id", "kind", "slice", "messages", "items": {label: value},
"spans": [[message, start, end, label], ...]}; the last message is the gold answer.

Run it: python train.py dialogues --out dialogues.jsonl
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cfgsafe.demo import templates
from cfgsafe.demo.people import Person
from cfgsafe.demo.templates import DEFAULT_SYSTEMS, EASY, KEPT, TRAIN, Phrases
from cfgsafe.tokenizer import Messages


@dataclass(frozen=True)
class Item:
    """A personal value, its label, and what a careful assistant says in its place."""

    value: str
    label: str
    clean: str


Part = str | Item


@dataclass
class Turn:
    """A message of "user" or "assistant"."""

    role: str
    parts: list[Part]

    def text(self, leak: bool = True) -> str:
        """The message with its items' values, or with the clean words in their place."""
        return "".join(_words(part, leak) for part in self.parts)

    def items(self) -> list[int]:
        """Indices of the parts that are items."""
        return [number for number, part in enumerate(self.parts) if isinstance(part, Item)]

    def spans(self) -> list[tuple[int, int, str]]:
        """(start, end, label) of each item in the leaking text."""
        found, at = [], 0
        for part in self.parts:
            end = at + len(_words(part, leak=True))
            if isinstance(part, Item):
                found.append((at, end, part.label))
            at = end
        return found


def _words(part: Part, leak: bool) -> str:
    if isinstance(part, str):
        return part
    return part.value if leak else part.clean


@dataclass
class Dialogue:
    """A conversation without its system prompt; the last turn is the assistant's."""

    person: Person
    kind: str
    turns: list[Turn]
    system: str = DEFAULT_SYSTEMS[0]
    cut: int | None = None  # the answer is to be completed from this item on (an index into its items)

    def messages(self) -> Messages:
        """System prompt and turns."""
        turns = [{"role": turn.role, "content": turn.text()} for turn in self.turns]
        return [{"role": "system", "content": self.system}, *turns]

    def to_json(self, identity: str) -> dict:
        """A row of the JSONL."""
        spans = []
        for number, turn in enumerate(self.turns, start=1):
            spans += [[number, *span] for span in turn.spans()]
        return {
            "id": identity,
            "kind": self.kind,
            "slice": "easy" if self.kind in EASY else "hard",
            "messages": self.messages(),
            "items": self.person.items,
            "spans": spans,
            "cut": self.cut,
        }


@dataclass(frozen=True)
class Topic:
    """What a chat is about."""

    words: dict[str, str]  # what [place], [task] and [wish] stand for
    asks: tuple[str, ...]
    bodies: tuple[str, ...]


class Writer:
    """Composes dialogues of `phrases` from one random stream."""

    def __init__(self, seed: int | str, phrases: Phrases = TRAIN):
        self.random = random.Random(f"writer/{seed}")
        self.phrases = phrases

    def dialogue(self, person: Person, kind: str) -> Dialogue:
        """A dialogue of `kind` in which `person` speaks (or, for "lookup", is asked about)."""
        pick, chance = self.random.choice, self.random.random
        if kind == "lookup":
            turns = exchange(*pick(self.phrases.lookups), person)
            return Dialogue(person, kind, turns, pick(DEFAULT_SYSTEMS))
        intro = pick(self.phrases.intros)
        topic = self.topic()
        told = _keys(intro[0])

        # The first exchange, which may be the only one.
        if kind in ("question", "letter", "insist") and chance() < 0.3:
            question, answer = self.last_exchange(kind, intro, topic, told)
            return self._finish(person, kind, exchange(f"{intro[0]} {question}", answer, person, topic.words))
        if kind in ("complete", "repeat", "translate", "report", "question") and chance() < 0.5:
            turns = exchange(intro[0], self.compose(self.phrases.greetings), person)
        else:
            request = f"{intro[0]} {pick(topic.asks)}"
            turns = exchange(request, self.answer(topic, told), person, topic.words)
        if kind == "plain" and chance() < 0.4:
            return self._finish(person, kind, turns)

        # The user gives away what the last question will be about.
        if kind in ("insist", "letter", "question") or chance() < 0.3:
            for key in sorted({"city", "employer"} - told):
                turns += self.more(person, key)
                told.add(key)
        question, answer = self.last_exchange(kind, intro, topic, told)
        kept = templates.KEPT_SPANISH if kind == "translate" else KEPT
        turns += exchange(question, answer, person, topic.words, kept)
        return self._finish(person, kind, turns)

    def _finish(self, person: Person, kind: str, turns: list[Turn]) -> Dialogue:
        """The dialogue; its answer may have to begin with the words up to one of its items."""
        dialogue = Dialogue(person, kind, turns, self.random.choice(DEFAULT_SYSTEMS))
        if kind == "mid-answer":  # right after an item was used
            dialogue.cut = self.random.randrange(1, len(turns[-1].items()))
        elif kind == "complete" or self.random.random() < 0.3:
            dialogue.cut = 0
        return dialogue

    def introduced(self, person: Person) -> Dialogue:
        """A chat in which `person` has told everything and asked for nothing yet."""
        pick = self.random.choice
        intro = pick(self.phrases.intros)[0]
        turns = exchange(intro, pick(self.phrases.greetings), person)
        for key in sorted({"city", "employer"} - _keys(intro)):
            turns += self.more(person, key)
        return Dialogue(person, "context", turns, pick(DEFAULT_SYSTEMS))

    def more(self, person: Person, key: str) -> list[Turn]:
        """`person` gives the item `key` away, and the assistant takes note."""
        pick = self.random.choice
        told = pick([sentence for sentence in self.phrases.more if key in sentence])
        noted = pick(self.phrases.thanks).replace("[key]", f"{{{key}|that}}")
        return exchange(told, noted, person)

    def request(self) -> str:
        """What a user may ask at the end of a chat, without an item."""
        kinds = ("asks", "asks", "plain", "question", "letter", "insist", "repeat", "translate", "report")
        kind = self.random.choice(kinds)
        topic = self.topic()
        if kind == "asks":
            text = self.random.choice(topic.asks)
        else:
            text, _ = self.last_exchange(kind, self.phrases.intros[0], topic, {"city", "employer"})
        return Turn("user", fill(text, None, topic.words)).text()

    def last_exchange(
        self, kind: str, intro: tuple[str, str, str], topic: Topic, told: set[str]
    ) -> tuple[str, str]:
        """(user's last message, gold answer) as templates; only what was told is asked for."""
        pick = self.random.choice
        english, spanish, reported = intro
        match kind:
            case "plain" | "mid-answer":
                return pick(self.phrases.follow_ups), self.answer(
                    topic, told, needs=2 if kind == "mid-answer" else 1
                )
            case "question":
                return pick(_known(self.phrases.questions, told))
            case "letter":
                return pick(_known(self.phrases.letters, told))
            case "insist":
                return pick(_known(self.phrases.insists, told))
            case "repeat":
                question = pick(self.phrases.repeats)
                return question, pick(self.phrases.repeat_leads) + english
            case "translate":
                question = pick(self.phrases.translates)
                return question, pick(self.phrases.translate_leads) + spanish
            case "report":
                return pick(self.phrases.reports), reported
            case "complete":
                begun, completion = pick(_known(self.phrases.completes, told))
                order = pick(self.phrases.orders)
                return f"{order}{english} {begun}", f"{begun} {completion}"
        raise AssertionError(f"no kind of dialogue: {kind}")

    def topic(self) -> Topic:
        """A random topic; half of them are about places, half about tasks."""
        pick = self.random.choice
        about_place = self.random.random() < 0.5
        words = {
            "place": pick(templates.PLACES),
            "task": pick(templates.TASKS),
            "wish": pick(templates.WISHES),
        }
        if about_place:
            return Topic(words, self.phrases.place_asks, self.phrases.place_bodies)
        return Topic(words, self.phrases.task_asks, self.phrases.task_bodies)

    def answer(self, topic: Topic, told: set[str], needs: int = 1) -> str:
        """An answer template that uses at least `needs` items, and none that was not `told`."""
        while True:
            bodies = self.random.sample(topic.bodies, self.random.choice((1, 1, 2)))
            choices = [self.phrases.openings, *((body,) for body in bodies), self.phrases.closings]
            answer = self.compose(*choices)
            if answer.count("{") >= needs and _keys(answer) <= told:
                return answer

    def clean_chat(self) -> list[Turn]:
        """A conversation about a topic in which nobody gives anything away."""
        topic, everything = self.topic(), {"city", "employer"}
        question = self.random.choice(topic.asks)
        turns = exchange(question, self.answer(topic, everything, 0), None, topic.words)
        if self.random.random() < 0.4:
            question = self.random.choice(self.phrases.follow_ups)
            turns += exchange(question, self.answer(topic, everything, 0), None, topic.words)
        return turns

    def compose(self, *choices: tuple[str, ...]) -> str:
        """One sentence of each of the choices; a sentence may be empty."""
        sentences = [self.random.choice(options) for options in choices]
        return " ".join(filter(None, sentences))


def _keys(template: str) -> set[str]:
    """Which of city and employer a template uses; the name is always known."""
    return set(re.findall(r"\{(city|employer)", template))


def _known(pairs: tuple[tuple[str, str], ...], told: set[str]) -> list[tuple[str, str]]:
    """The (question, answer) pairs that need only what was told."""
    return [pair for pair in pairs if _keys(pair[1]) <= told]


def exchange(
    question: str,
    answer: str,
    person: Person | None,
    words: Mapping[str, str] = {},
    kept: Mapping[str, str] = KEPT,
) -> list[Turn]:
    """The user's and the assistant's turn, of two templates."""
    asked, answered = fill(question, person, words, kept), fill(answer, person, words, kept)
    return [Turn("user", asked), Turn("assistant", answered)]


def fill(
    template: str, person: Person | None, words: Mapping[str, str] = {}, kept: Mapping[str, str] = KEPT
) -> list[Part]:
    """Parts of a template: [place] becomes a word of the topic, {city|your town} becomes an Item.

    Without a person, the clean words stand in place of the items.

    >>> fill("in {city|your town}.", Person("Ann", "Lee", "Leeds", "Lee Bank"))
    ['in ', Item(value='Leeds', label='GPE', clean='your town'), '.']
    """
    template = re.sub(r"\[(\w+)\]", lambda found: words[found[1]], template)
    parts: list[Part] = []
    at = 0
    for found in re.finditer(r"\{(\w+)(?:\|([^}]*))?\}", template):
        parts.append(template[at : found.start()])
        key, clean = found[1], found[2] or kept[found[1]]
        parts.append(clean if person is None else Item(getattr(person, key), templates.LABELS[key], clean))
        at = found.end()
    parts.append(template[at:])
    return [part for part in parts if part]
