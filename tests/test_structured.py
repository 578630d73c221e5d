"""Personal data with a fixed form: what each form finds, what it leaves, the checksums, and its time."""

import time

import pytest

from cfgsafe.pii.structured import find, luhn, mod_97

FOUND = (
    ("Write to ann.lee+x@mail.example.org.", "EMAIL", "ann.lee+x@mail.example.org"),
    ("See https://example.org/a?b=1.", "URL", "https://example.org/a?b=1"),
    ("See linkedin.com/in/ann-lee, please", "URL", "linkedin.com/in/ann-lee"),
    ("Host 10.1.2.3.", "IP", "10.1.2.3"),
    ("Host 2001:db8::1, too", "IP", "2001:db8::1"),
    ("IBAN GB82 WEST 1234 5698 7654 32!", "IBAN", "GB82 WEST 1234 5698 7654 32"),
    ("NL91ABNA0417164300", "IBAN", "NL91ABNA0417164300"),
    ("NL92ABNA0417164300", "ID", "NL92ABNA0417164300"),  # a wrong checksum
    ("Card 4111-1111-1111-1111.", "CARD", "4111-1111-1111-1111"),
    ("Card 4111-1111-1111-1112.", "NUMBER", "4111-1111-1111-1112"),
    ("Call +46 70-123 45 67.", "PHONE", "+46 70-123 45 67"),
    ("Call (212) 555-0123 today", "PHONE", "(212) 555-0123"),
    ("Call 020 - 785 - 4321 today", "PHONE", "020 - 785 - 4321"),
    ("Account 102938475612.", "NUMBER", "102938475612"),
    ("Number 536-90-4399", "NUMBER", "536-90-4399"),
    ("Insured as K5M-33-78901.", "ID", "K5M-33-78901"),
    ("She was born on 14/08/1975.", "DATE_OF_BIRTH", "14/08/1975"),
    ("Birthday: August 3rd, 1990", "DATE_OF_BIRTH", "August 3rd, 1990"),
    ("DOB 1990-08-03", "DATE_OF_BIRTH", "1990-08-03"),
)


@pytest.mark.parametrize(("text", "label", "value"), FOUND)
def test_each_form_is_found_where_it_stands(text, label, value):
    (found,) = find(text)
    assert (found.label, found.text) == (label, value)
    assert text[found.start : found.end] == value


@pytest.mark.parametrize(
    "text",
    [
        "From 1999-2003 and 2019/2020, at 12:30:45.",
        "Pi is 3.14159265, not 0.0001234567 0.5.",
        "We met on 14/08/1975 at 12, and on 3 May 1980.",
        "In 1999. 2000 people of 1,234,567 came.",
        "std::vector, a::b, e.g./i.e. and/or COVID-19 by ISO-9001:2015",
        "Steps 1-2-3-4-5-6-7 and 1 2 3 4 5 6 7 8.",
        "Born in Leeds. On 4/5/2020 she left.",
        "a@b, @ann, 999.1.2.3, X12345",
    ],
)
def test_what_identifies_nobody_is_left(text):
    assert find(text) == []


def test_finds_do_not_overlap_and_come_in_order():
    text = "Ann, ann@example.org/4111111111111111, born 3 May 1980, 010 - 987 - 6543"
    found = find(text)
    assert [entity.label for entity in found][-2:] == ["DATE_OF_BIRTH", "PHONE"]
    for one, following in zip(found, found[1:], strict=False):
        assert one.end <= following.start


def test_checksums_by_hand():
    """79927398713: the doubled 1, 8, 3, 2, 9 give 2, 7, 6, 4, 9, with 3 + 7 + 9 + 7 + 9 + 7 a sum of 70."""
    assert [digit for digit in "0123456789" if luhn("7992739871" + digit)] == ["3"]
    good = [check for check in range(100) if mod_97(f"GB{check:02}WEST12345698765432")]
    assert good == [82]


@pytest.mark.parametrize("part", ["0 ", "a.", "1-", "a", "1", "a@", "a@a.", "1.1.", "+(", ":1", "-_", "www."])
def test_a_long_text_takes_no_time(part):
    """Some of these took minutes, at 40,000 characters, by expressions without bounds."""
    started = time.process_time()
    find(part * 5_000)
    assert time.process_time() - started < 2
