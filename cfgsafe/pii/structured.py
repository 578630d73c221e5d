"""Personal data with a fixed form, by regular expressions: what an NER of names and places does not look for.

    EMAIL           a@b.cc
    URL             http://, https:// or www. and what follows; or host.tld/path
    IP              version 4: four numbers to 255; version 6: what Python's ipaddress reads
    IBAN            a country, two digits, up to 30 more: remainder 1 modulo 97
    CARD            13 to 19 digits, in groups or not, with Luhn's checksum
    PHONE           7 to 15 digits in groups, the first of which begins with +, 0 or a bracket
    NUMBER          other runs of 7 digits or more, in groups or not
    ID              a word, perhaps with hyphens, of letters and 6 digits or more
    DATE_OF_BIRTH   a date that follows "born", "birth" or "DOB" in the same sentence

Dates, spans of years (1999-2003) and decimals (3.1415926) do not count as digits of a run, nor do the
thousands of 1,234,567; a run has at least two digits a group (not 1 2 3 4 5 6 7).

Source: ISO 13616 and ISO 7064 (IBAN), ISO/IEC 7812 (Luhn), RFC 4291 (IP 6), ITU E.164 (15 digits of a phone).
Deviations: an IBAN or card number whose checksum is wrong is a find too, as ID or NUMBER: what a model
invents, or recalls with a fault, is written as personal data all the same. Dates without a birth are
none, as in the paper (cfgsafe/pii/ner.py). There are no lists of domains or area codes; presidio has them.

Run it: python eval.py detectors --ner cfgsafe/demo/ner,structured
"""

import ipaddress
import re
from collections.abc import Callable

from cfgsafe.pii.entities import Entity, merge

MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
ORDINAL = r"\d{1,2}(?:st|nd|rd|th)?"
DATE = (
    r"(?:\d{1,2}[./-]\d{1,2}[./-](?:\d{4}|\d{2})|\d{4}[./-]\d{1,2}[./-]\d{1,2}"
    rf"|{ORDINAL}(?: of)? {MONTH},? \d{{4}}|{MONTH} {ORDINAL},? \d{{4}})(?!\d)"
)
YEAR = r"(?:1[5-9]|20)\d\d"
NO_DIGITS = re.compile(  # of a run: dates, spans of years, decimals
    rf"(?<!\d){DATE}|(?<!\d){YEAR} ?[-/. ] ?{YEAR}(?!\d)|(?<![\d./-])\d+\.\d+(?![./-]?\d)", re.IGNORECASE
)
RUN = re.compile(r"[+(]{0,2}\d+(?:(?: ?- ?|[./ ]|\)[ -]?| \()\d+)*")  # ends where no digit follows
LABEL = r"[a-z0-9-]{1,63}"  # of a domain
BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"


def luhn(number: str) -> bool:
    """Whether the last digit is the checksum of the others.

    >>> luhn("4111 1111 1111 1111"), luhn("4111 1111 1111 1112")
    (True, False)
    """
    total = 0
    for place, digit in enumerate(reversed(re.sub(r"\D", "", number))):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def mod_97(iban: str) -> bool:
    """Whether an IBAN's two check digits are right: letters are 10 to 35, the first four go to the end.

    >>> mod_97("GB82 WEST 1234 5698 7654 32"), mod_97("GB83 WEST 1234 5698 7654 32")
    (True, False)
    """
    letters = re.sub(r"\s", "", iban)
    digits = "".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4])
    return int(digits) % 97 == 1


def _is_ip6(text: str) -> bool:
    """Two groups at least, with a digit: not ::, nor the a::b of programs."""
    groups = [group for group in text.split(":") if group]
    if len(groups) < 2 or not any(character.isdigit() for character in text):
        return False
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _is_id(text: str) -> bool:
    return _digits(text) >= 6 and any(character.isalpha() for character in text)


def _digits(text: str) -> int:
    return sum(character.isdecimal() for character in text)


def _always(text: str) -> bool:
    return True


# label, what it looks like (where only a part is the find: the group "value"), and what must hold as well.
# No expression may take a time that grows faster than the text: repetitions have a bound or a fixed start.
FORMS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("EMAIL", rf"(?<![\w.+-])[\w.+-]{{1,64}}@{LABEL}(?:\.{LABEL}){{1,8}}", _always),
    ("URL", r"(?:https?://|www\.)[^\s<>\"']*[\w/]", _always),
    ("URL", rf"(?<![\w@.-])(?:{LABEL}\.){{1,8}}[a-z]{{2,24}}/[^\s<>\"']*[\w/]", _always),
    ("IP", rf"(?<![\d.])(?:{BYTE}\.){{3}}{BYTE}(?!\.?\d)", _always),
    ("IP", r"(?<![\w:])[0-9a-f:]{3,39}(?![\w:])", _is_ip6),
    ("IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", mod_97),
    ("ID", r"(?<![\w-])[a-z0-9]+(?:-[a-z0-9]+)*(?![\w-])", _is_id),
    (
        "DATE_OF_BIRTH",
        rf"\b(?:born|birth[a-z]*|d\.?o\.?b\.?)(?![a-z])[^.!?\n]{{0,60}}?(?P<value>(?<!\d){DATE})",
        _always,
    ),
)
COMPILED = []
for _label, _form, _holds in FORMS:
    COMPILED.append((_label, re.compile(_form, 0 if _label == "IBAN" else re.IGNORECASE), _holds))


def find(text: str) -> list[Entity]:
    """The personal items of a text, in their order; no two overlap.

    >>> [(found.label, found.text) for found in find("Ann, born on 3 May 1980: ann@x.org, +46 70-123 45 67.")]
    [('DATE_OF_BIRTH', '3 May 1980'), ('EMAIL', 'ann@x.org'), ('PHONE', '+46 70-123 45 67')]
    """
    found = []
    for label, pattern, holds in COMPILED:
        for match in pattern.finditer(text):
            start, end = match.span("value" if "value" in pattern.groupindex else 0)
            if holds(text[start:end]):
                found.append(Entity(start, end, label, text[start:end]))
    for match in RUN.finditer(text):
        start, end = match.span()
        beside = text[max(0, start - 1) : start] + text[end : end + 1]
        kind = _kind_of_run(match[0])
        if kind and not any(character.isalnum() or character == "_" for character in beside):
            found.append(Entity(start, end, kind, match[0]))
    return merge(text, [found])


def find_all(texts: list[str]) -> list[list[Entity]]:
    """What `find` finds in each text."""
    return [find(text) for text in texts]


def _kind_of_run(run: str) -> str | None:
    """CARD, PHONE or NUMBER; None for digits that identify nobody."""
    rest = NO_DIGITS.sub("", run)
    groups = re.findall(r"\d+", rest)
    digits = sum(len(group) for group in groups)
    if digits < 7 or digits < 2 * len(groups):
        return None
    if 13 <= _digits(run) <= 19 and luhn(run):
        return "CARD"
    return "PHONE" if run[0] in "+(0" and len(groups) > 1 and digits <= 15 else "NUMBER"
