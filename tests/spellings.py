"""Personal values and the ways in which people and models write them, made by rules of their own.

Nothing here is taken from the matcher (cfgsafe/pii/matching.py): each kind of value has writers, which are
what Markdown, handles, forms, mail programs, telephone lists and other alphabets do to it. The same seed
makes the same values and spellings.

    python tests/test_spellings.py      # how many are counted and masked, by kind, and false alarms
"""

import random
import textwrap
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

Writer = Callable[[str, random.Random], str]


@dataclass(frozen=True)
class Spelling:
    """A value and a text that holds it; `written` is how it stands there, by the writer of that name."""

    kind: str
    label: str
    value: str
    writer: str
    written: str
    text: str


FIRST = (
    "Maria Jonas Øystein Zoë Łukasz Ana-Lucía Björn Siobhán François Ngozi Ida Anna-Lena Bartłomiej".split()
)
LAST = "Keller O'Brien Lindström Nowakowska García Müller Straßer Okonkwo Dağ İnci Węgrzyn Fitzgerald".split()
CYRILLIC = ["Анна Петрова", "Дмитрий Соколов", "Ольга Кузнецова", "Юрій Шевченко"]
GREEK = ["Γιώργος Παπαδόπουλος", "Ελένη Νικολάου"]
SPACED = ["محمد العلي", "فاطمة حسين", "יעל כהן", "דוד לוי", "प्रिया शर्मा", "अमित वर्मा"]
CHINESE = ["王小明", "李娜", "欧阳修文", "张伟强", "陈美玲"]
JAPANESE = ["田中太郎", "佐藤花子", "鈴木一郎", "マリア・ケラー"]
THAI = ["สมชาย ใจดี", "นภาพร", "กิตติศักดิ์"]
KOREAN = ["김민수", "박지영", "이서연"]
TOWNS = [
    "New York",
    "Sankt Gallen",
    "São Paulo",
    "Aix-en-Provence",
    "Stratford upon Avon",
    "Lund",
    "Gelsenkirchen",
]
STREETS = ["Main Street", "Kungsgatan", "Rue de l'Église", "Lange Straße", "Baker Street"]
MONTHS = "January March May August October December".split()
RUNNING = {  # text around a value in scripts without blanks, or with endings
    "chinese": ["我叫{}今年三十岁。", "昨天{}给我打了电话", "联系人：{}，谢谢"],
    "japanese": ["担当は{}です。", "昨日、{}さんが来た", "お名前：{}（本人）"],
    "thai": ["ผมชื่อ{}ครับ", "ติดต่อคุณ{}ได้เลย"],
    "korean": ["{}은 어제 왔다", "담당자 {}에게 연락", "제 이름은 {}입니다"],
}
SENTENCES = [
    "Please write to {} soon.",
    "It was {}, as far as I know.",
    "({}) is what the form says",
    "Dear all, {}!",
    "{} stands at the top",
    "The entry reads: {}",
]
MARKED = ["Group: {}", 'The form says "{}" here', "We met ({}).", "He is of type **{}** now"]


def as_it_is(value: str, rng: random.Random) -> str:
    return value


def in_lower_case(value: str, rng: random.Random) -> str:
    return value.lower()


def in_capitals(value: str, rng: random.Random) -> str:
    return value.upper()


def in_markdown(value: str, rng: random.Random) -> str:
    return rng.choice(["_{}_", "**{}**", "`{}`", "~~{}~~", "***{}***", "__{}__"]).format(value)


def with_bold_words(value: str, rng: random.Random) -> str:
    return " ".join(f"**{word}**" for word in value.split(" "))


def in_snake_case(value: str, rng: random.Random) -> str:
    return value.lower().replace(" ", "_")


def with_dots(value: str, rng: random.Random) -> str:
    return value.lower().replace(" ", ".")


def as_a_handle(value: str, rng: random.Random) -> str:
    joined = "".join(word[:1].upper() + word[1:] for word in value.split(" "))
    return rng.choice(["@{}", "#{}", "{}1980", "The{}", "{}_77"]).format(joined)


def with_a_year(value: str, rng: random.Random) -> str:
    return f"{value}{rng.randint(1950, 2010)}"


def of_a_mailbox(value: str, rng: random.Random) -> str:
    return value.lower().replace(" ", rng.choice([".", "_", "-", ""])) + "@example.org"


def last_name_first(value: str, rng: random.Random) -> str:
    *first, last = value.split(" ")
    return f"{last}, {' '.join(first)}"


def with_an_s(value: str, rng: random.Random) -> str:
    return value + rng.choice(["'s", "’s"])


def in_a_compound(value: str, rng: random.Random) -> str:
    return value.replace(" ", "-") + rng.choice(["-based", "-led", "-style"])


def over_lines(value: str, rng: random.Random) -> str:
    return value.replace(" ", rng.choice(["\n", "\r\n", "  ", "\t", "\n    ", "\n> "]), 1)


def with_fixed_blanks(value: str, rng: random.Random) -> str:
    return value.replace(" ", rng.choice(["\u00a0", "\u202f", "\u2009", "\u3000"]))


def wrapped(value: str, rng: random.Random) -> str:
    """A word of at least six letters, hyphenated over two lines."""
    words = value.split(" ")
    longest = max(range(len(words)), key=[len(word) for word in words].__getitem__)
    word = words[longest]
    at = next((k for k in range(3, len(word) - 2) if word[k - 1 : k + 1].isalpha()), 0)
    if at:
        words[longest] = f"{word[:at]}-\n{word[at:]}"
    return " ".join(words)


def with_soft_hyphens(value: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(value)) if len(value) > 1 else 1
    return value[:at] + rng.choice(["\u00ad", "\u200b", "\u2060", "\u200d"]) + value[at:]


def decomposed(value: str, rng: random.Random) -> str:
    return unicodedata.normalize("NFD", value)


def full_width(value: str, rng: random.Random) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c.replace(" ", "\u3000") for c in value)


def with_ligatures(value: str, rng: random.Random) -> str:
    return value.replace("fi", "ﬁ").replace("fl", "ﬂ").replace("ff", "ﬀ")


def other_apostrophes(value: str, rng: random.Random) -> str:
    return value.replace("'", rng.choice("’ʼ‘"))


def other_separators(value: str, rng: random.Random) -> str:
    """A number whose groups are joined by something else, or by nothing."""
    joint = rng.choice(["-", ".", "", " ", "\u2011", "/", "\u00a0"])
    for old in " -./":
        value = value.replace(old, joint)
    return value


def other_groups(value: str, rng: random.Random) -> str:
    """Digits in groups of three, behind the plus."""
    digits = "".join(filter(str.isdecimal, value))
    return ("+" if value.startswith("+") else "") + " ".join(textwrap.wrap(digits, 3))


def in_brackets(value: str, rng: random.Random) -> str:
    first, *rest = value.replace("(", "").replace(")", "").split(" ")
    return f"({first}) {' '.join(rest)}"


def in_eastern_digits(value: str, rng: random.Random) -> str:
    start = ord(rng.choice("٠०๐"))
    return "".join(chr(start + int(c)) if c.isdecimal() else c for c in value)


def in_a_link(value: str, rng: random.Random) -> str:
    return rng.choice(["mailto:{}", "<{}>", "[mail]({})", "({})"]).format(value)


def without_blank(value: str, rng: random.Random) -> str:
    return value.replace(" ", "").replace("・", "")


def with_a_blank(value: str, rng: random.Random) -> str:
    at = 2 if len(value) > 3 else 1
    return (
        value
        if " " in value or "・" in value
        else f"{value[:at]}{rng.choice([' ', chr(0x3000), '・'])}{value[at:]}"
    )


EVERYWHERE = [as_it_is, in_markdown, with_soft_hyphens, over_lines, with_fixed_blanks]
LATIN = [
    *EVERYWHERE,
    in_lower_case,
    in_capitals,
    decomposed,
    full_width,
    with_ligatures,
    with_bold_words,
    wrapped,
]
HANDLES = [in_snake_case, with_dots, as_a_handle, with_a_year, of_a_mailbox, last_name_first]
WRITERS: dict[str, list[Writer]] = {
    "name": [*LATIN, *HANDLES, with_an_s, other_apostrophes],
    "cyrillic or greek name": [*EVERYWHERE, in_lower_case, in_capitals, decomposed, *HANDLES, wrapped],
    "arabic, hebrew or indic name": [*EVERYWHERE, decomposed, with_bold_words, last_name_first],
    "chinese": [*EVERYWHERE, with_a_blank],
    "japanese": [*EVERYWHERE, with_a_blank, without_blank, decomposed],
    "thai": [*EVERYWHERE, without_blank],
    "korean": [*EVERYWHERE, decomposed],
    "town": [*LATIN, in_a_compound, in_snake_case, with_an_s],
    "address": [*LATIN, in_snake_case],
    "phone": [
        as_it_is,
        other_separators,
        other_groups,
        in_brackets,
        full_width,
        in_eastern_digits,
        with_fixed_blanks,
    ],
    "date": [*EVERYWHERE, in_lower_case, in_capitals, full_width],
    "numeric date": [as_it_is, other_separators, full_width, in_markdown],
    "e-mail": [as_it_is, in_lower_case, in_capitals, in_a_link, full_width, with_soft_hyphens, in_markdown],
    "number of a document": [as_it_is, other_separators, in_lower_case, full_width, in_markdown],
    "one letter": [as_it_is, full_width],
    "one digit": [as_it_is, full_width, in_markdown],
}
LABELS = {"town": "GPE", "address": "FAC", "phone": "PHONE", "date": "DATE", "numeric date": "DATE"}
LABELS |= {"e-mail": "EMAIL", "number of a document": "ID", "one letter": "GROUP", "one digit": "AGE"}


def values(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(kind, value) of `count` values, no value twice; names are a third, numbers of all kinds another."""
    rng = random.Random(seed)
    kinds = ["name"] * 5 + [*WRITERS, "phone", "town", "e-mail", "date"]
    found: dict[str, str] = {}
    while len(found) < count:
        kind = kinds[len(found) % len(kinds)]
        value = value_of(kind, rng)
        for _ in range(50):
            if value not in found:
                break
            value = value_of(kind, rng)
        else:  # a kind with few values
            kind, value = "name", value_of("name", rng)
        found.setdefault(value, kind)
    return [(kind, value) for value, kind in found.items()]


def value_of(kind: str, rng: random.Random) -> str:
    number = rng.randint
    match kind:
        case "name":
            return f"{rng.choice(FIRST)} {rng.choice(LAST)}"
        case "cyrillic or greek name":
            return rng.choice(CYRILLIC + GREEK)
        case "arabic, hebrew or indic name":
            return rng.choice(SPACED)
        case "chinese":
            return rng.choice(CHINESE)
        case "japanese":
            return rng.choice(JAPANESE)
        case "thai":
            return rng.choice(THAI)
        case "korean":
            return rng.choice(KOREAN)
        case "town":
            return rng.choice(TOWNS)
        case "address":
            return f"{number(1, 250)} {rng.choice(STREETS)}, {rng.choice(TOWNS)}"
        case "phone":
            form = rng.choice(
                ["+46 7# ### ## ##", "(###) ###-####", "030/#######", "0##-### ## ##", "### ####"]
            )
            return "".join(str(number(0, 9)) if c == "#" else c for c in form)
        case "date":
            return f"{number(1, 28)} {rng.choice(MONTHS)} {number(1940, 2009)}"
        case "numeric date":
            return f"{number(10, 28)}.{number(10, 12)}.{number(1940, 2009)}"
        case "e-mail":
            name = rng.choice(["maria.keller", "j_nowak", "lena-w", "oskar88", "info.ida"])
            return f"{name}@{rng.choice(['mail.example', 'example.org', 'post.example.net'])}"
        case "number of a document":
            form = rng.choice(["SE## #### #### ####", "###-##-####", "AB## CDE#", "#### #### #### ####"])
            return "".join(str(number(0, 9)) if c == "#" else c for c in form)
        case "one letter":
            return rng.choice("ABIOX")
        case _:
            return str(number(2, 9))


def spellings(count: int, of: int, seed: int = 0) -> list[Spelling]:
    """`count` spellings of `of` values: each value in as many ways of its kind as that takes, in turn."""
    rng = random.Random(f"spellings {seed}")
    found = []
    chosen = values(of, seed)
    for number in range(count):
        kind, value = chosen[number % of]
        writers = WRITERS[kind]
        writer = writers[(number // of * 5 + number) % len(writers)]
        written = writer(value, rng)
        frames = RUNNING.get(kind, MARKED if kind == "one letter" else SENTENCES)
        text = rng.choice(frames).format(written)
        label = LABELS.get(kind, "PERSON")
        found.append(Spelling(kind, label, value, writer.__name__.replace("_", " "), written, text))
    return found
