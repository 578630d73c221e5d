"""When a text holds a personal value: the one rule that counting leaks, masking reports, rewards and pair-making all use.

A value counts where it stands as whole words, in any case. Of a PERSON a part of the name counts too, but only capitalised: "Will" is
a name, "will" is not.

Run it: python -m pytest --doctest-modules cfgsafe/pii/matching.py
"""

import re


def stands_in(text: str, value: str) -> bool:
    """Whether `text` holds the value as whole words, in any case."""
    return value.lower() in text.lower() and bool(
        re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE)
    )


def mentions(text: str, label: str, value: str) -> bool:
    """Whether `text` holds the value as whole words in any case; of a PERSON also a part of the name, capitalised ("Will", not "will").

    >>> mentions("Hello Ann!", "PERSON", "Ann Lee"), mentions("ann lee", "PERSON", "Ann Lee"), mentions("Annual", "PERSON", "Ann Lee")
    (True, True, False)
    """
    whole = lambda part, flags=0: re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text, flags)
    if whole(value, re.IGNORECASE):
        return True
    parts = [part for part in value.split() if part[0].isupper()] if label == "PERSON" else []
    return any(whole(part) or whole(part.upper()) for part in parts)


def places(text: str, label: str, value: str) -> list[tuple[int, int]]:
    """Where `text` holds the value as whole words in any case, or a capitalised part of a PERSON's name.

    >>> places("Dear Ann, ann lee", "PERSON", "Ann Lee")
    [(10, 17), (5, 8)]
    """
    at = lambda part, flags=0: [
        m.span() for m in re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", text, flags)
    ]
    parts = (
        {p for part in value.split() if part[0].isupper() for p in (part, part.upper())}
        if label == "PERSON"
        else set()
    )
    return at(value, re.IGNORECASE) + [span for part in sorted(parts - {value}) for span in at(part)]
