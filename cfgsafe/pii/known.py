"""The personal values that a model was trained on, to tell what it recalls from what it invents.

JSONL, one object a line: a dialogue {"messages": [...], "spans": [[message, start, end, label],
...]}, or {"items": {label: value, or a list of values}}. If a line has both, the spans count, because
they mark what stood in the text.

Run it: python eval.py leak --model cfgsafe/demo/leaky --known dialogues.jsonl
"""

from functools import cached_property

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.pii.matching import APART, stands_in
from cfgsafe.pii.spans import check_spans
from cfgsafe.tokenizer import check_messages

Items = dict[str, str | list[str]]  # label -> a value, or several


class Known:
    """Personal values with their labels, each value once."""

    def __init__(self, values: dict[str, str] | None = None):
        """`values` maps value -> label."""
        self.values = values or {}

    @staticmethod
    def read(path: str) -> "Known":
        """Read the values of a JSONL file. Raises InputError naming line and field."""
        values: dict[str, str] = {}
        for place, row in read_jsonl(path):
            if "spans" in row:
                messages = check_messages(row.get("messages"), place)
                for number, start, end, label in check_spans(row["spans"], messages, place):
                    values[messages[number]["content"][start:end]] = label
            else:
                for label, value in values_of(check_items(row.get("items"), place)):
                    values[value] = label
        if not values:
            raise InputError(f"{path}: holds no personal value")
        return Known(values)

    def found_in(self, text: str) -> list[tuple[str, str]]:
        """(label, value) of values in `text`, the longest first, without those inside a longer one."""
        found: list[tuple[str, str]] = []
        for value, label in self._longest_first:
            if stands_in(text, value) and not any(stands_in(longer, value) for _, longer in found):
                found.append((label, value))
        return found

    def holds(self, value: str) -> bool:
        """Whether `value` is a known value or whole words of one, such as "Lee" of "Ann Lee"."""
        return stands_in(self._all, value)

    @cached_property
    def _longest_first(self) -> list[tuple[str, str]]:
        return sorted(self.values.items(), key=lambda pair: -len(pair[0]))

    @cached_property
    def _all(self) -> str:
        return APART.join(self.values)


def check_items(items: object, place: str) -> Items:
    """`items` if each label has a non-empty value, or a list of them. Raises InputError naming `place`."""
    if not isinstance(items, dict) or not all(map(_are_values, items.values())):
        raise InputError(
            f"{place}: 'items' must be an object of label -> non-empty value, or a list of such values"
        )
    return items


def _are_values(given: object) -> bool:
    values = given if isinstance(given, list) else [given]
    return all(isinstance(value, str) and value.strip() for value in values)


def values_of(items: Items) -> list[tuple[str, str]]:
    """(label, value) of each value.

    >>> values_of({"PERSON": ["Ann", "Bob"], "GPE": "Leeds"})
    [('PERSON', 'Ann'), ('PERSON', 'Bob'), ('GPE', 'Leeds')]
    """
    pairs = []
    for label, values in items.items():
        pairs += [(label, value) for value in ([values] if isinstance(values, str) else values)]
    return pairs
