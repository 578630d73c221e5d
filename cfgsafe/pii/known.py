"""Personal values a model was trained on, as far as they are known: to tell what it recalls from what it invents.

JSONL, either dialogues {"messages": [...], "spans": [[message, start, end, label], ...]} or {"items": {label: value}} a line; of a line
with both, the spans count, because they are what stood in the text.

Run it: python eval.py leak --model cfgsafe/demo/leaky --known dialogues.jsonl
"""

from functools import cached_property

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.pii.matching import stands_in
from cfgsafe.pii.spans import check_spans
from cfgsafe.tokenizer import check_messages


class Known:
    """Values with their labels, each once."""

    def __init__(self, values: dict[str, str] | None = None):
        """`values`: value -> label."""
        self.values = values or {}

    @staticmethod
    def read(path: str) -> "Known":
        """Of a JSONL file. Raises InputError naming line and field."""
        values: dict[str, str] = {}
        for place, row in read_jsonl(path):
            if "spans" in row:
                messages = check_messages(row.get("messages"), place)
                spans = check_spans(row["spans"], messages, place)
                values |= {
                    messages[number]["content"][start:end]: label for number, start, end, label in spans
                }
            else:
                values |= {value: label for label, value in check_items(row.get("items"), place).items()}
        if not values:
            raise InputError(f"{path}: holds no personal value")
        return Known(values)

    def found_in(self, text: str) -> list[tuple[str, str]]:
        """(label, value) of the values that stand whole in `text`; of values inside one another only the longest."""
        found: list[tuple[str, str]] = []
        for value, label in self._longest_first:
            if stands_in(text, value) and not any(stands_in(longer, value) for _, longer in found):
                found.append((label, value))
        return found

    def holds(self, value: str) -> bool:
        """Whether `value` is one of the values or whole words of one, as "Lee" of "Ann Lee"."""
        return stands_in(self._together, value)

    @cached_property
    def _longest_first(self) -> list[tuple[str, str]]:
        return sorted(self.values.items(), key=lambda pair: -len(pair[0]))

    @cached_property
    def _together(self) -> str:
        return "\n".join(self.values)


def check_items(items: object, place: str) -> dict[str, str]:
    """`items` if it is an object of label -> non-empty value; raises InputError naming `place`."""
    if not isinstance(items, dict) or not all(isinstance(v, str) and v for v in items.values()):
        raise InputError(f"{place}: 'items' must be an object of label -> non-empty value")
    return items
