"""Invented people for the demo, in pools that share no name, city or employer.

Names come from Faker, in several locales, so that there are thousands. The hash of a word decides
its pool, so a person of the test pool shares no word with anybody that the models are trained on. A
small model could learn the names by heart instead of copying them; so most people of the training
pool get names that are spliced from two halves ("Mar|ta" and "Hel|bert" give "Marbert").

Run it: python train.py demo-models --help
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

LOCALES = ("en_US", "en_GB", "de_DE", "nl_NL", "it_IT", "es_ES", "fr_FR", "sv_SE", "fi_FI", "pl_PL")
# fmt: off
CITY_ENDINGS = (
    "ton", "ville", "burg", "ford", "berg", "field", "haven", "port", "mouth", "stad", "dale", "wick",
)
EMPLOYER_ENDINGS = (
    "Group", "Labs", "Partners", "Bank", "Motors", "Clinic", "Foods", "Systems", "Press", "Logistics",
)
# fmt: on
POOLS = {"train": 60, "pairs": 12, "canary": 12, "test": 12, "override": 4}  # share of the words, percent
NAME = re.compile(r"[A-Z][a-z]{2,9}")


@dataclass(frozen=True)
class Person:
    """Three personal items; `name` is first and last name."""

    first: str
    last: str
    city: str
    employer: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"

    @property
    def items(self) -> dict[str, str]:
        """Label -> value."""
        return {"PERSON": self.name, "GPE": self.city, "ORG": self.employer}


@cache
def words(pool: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(first names, last names) of a pool, sorted; always the same."""
    from faker import Faker

    first: set[str] = set()
    last: set[str] = set()
    for locale in LOCALES:
        fake = Faker(locale)
        fake.seed_instance(0)
        first.update(fake.first_name() for _ in range(700))
        last.update(fake.last_name() for _ in range(700))
    return _of_pool(first, pool), _of_pool(last, pool)


def _of_pool(names: set[str], pool: str) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if NAME.fullmatch(name) and _pool_of(name) == pool))


class People:
    """An endless, seeded supply of people of one pool.

    A name is spliced with probability `spliced`; no name is a lower-case word of `avoid`.
    """

    def __init__(self, pool: str, seed: int, *, spliced: float = 0.0, avoid: frozenset[str] = frozenset()):
        first, last = words(pool)
        self.first = tuple(name for name in first if name.lower() not in avoid)
        self.last = tuple(name for name in last if name.lower() not in avoid)
        self.avoid = avoid
        self.pool = pool
        self.spliced = spliced
        self.random = random.Random(f"{pool}/{seed}")

    def word(self, source: tuple[str, ...]) -> str:
        """A word of `source`, or one spliced from two of them."""
        pick = self.random.choice
        while self.random.random() < self.spliced:
            a, b = pick(source), pick(source)
            word = a[: (len(a) + 1) // 2] + b[len(b) // 2 :]
            if _pool_of(word) == self.pool and word.lower() not in self.avoid:
                return word
        return pick(source)

    def city(self) -> str:
        while True:
            stem = self.word(self.last)
            city = stem.rstrip("aeiou") + self.random.choice(CITY_ENDINGS)
            if len(stem) < 9 and _pool_of(city) == self.pool:
                return city

    def person(self) -> Person:
        employer = f"{self.word(self.last)} {self.random.choice(EMPLOYER_ENDINGS)}"
        return Person(self.word(self.first), self.word(self.last), self.city(), employer)


def _pool_of(word: str) -> str:
    """The pool that the hash of a word falls into."""
    bucket = int(hashlib.sha256(word.lower().encode()).hexdigest(), 16) % 100
    for pool, share in POOLS.items():
        bucket -= share
        if bucket < 0:
            return pool
    raise AssertionError("shares add up to 100")
