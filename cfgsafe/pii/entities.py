"""A personal item that a detector found in a text, and how the finds of several detectors are merged.

Source: this is our own rule; Smirnov (arXiv 2412.06846) uses a single detector.

Run it: python -m pytest tests/test_detectors.py
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entity:
    """A personal item: characters start to end (exclusive), the detector's label, the words."""

    start: int
    end: int
    label: str
    text: str


def merge(text: str, finds: list[list[Entity]], needed: int = 1) -> list[Entity]:
    """One entity for each run of overlapping finds in which at least `needed` detectors take part.

    `finds[i]` are the finds of detector i. The entity covers the whole run and has the label of
    its longest find; if two are equally long, of the first detector's.

    >>> merge("Ann Lee", [[Entity(0, 3, "PERSON", "Ann")], [Entity(0, 7, "NAME", "Ann Lee")]])
    [Entity(start=0, end=7, label='NAME', text='Ann Lee')]
    """
    merged = []
    for run in _overlapping_runs(finds):
        detectors = {detector for detector, _ in run}
        if len(detectors) >= needed:
            start = min(entity.start for _, entity in run)
            end = max(entity.end for _, entity in run)
            _, longest = min(run, key=lambda find: (find[1].start - find[1].end, find[0]))
            merged.append(Entity(start, end, longest.label, text[start:end]))
    return merged


def _overlapping_runs(finds: list[list[Entity]]) -> list[list[tuple[int, Entity]]]:
    """The finds as (number of the detector, entity), in groups of finds that overlap."""
    numbered: list[tuple[int, Entity]] = []
    for detector, entities in enumerate(finds):
        numbered += [(detector, entity) for entity in entities]
    numbered.sort(key=lambda find: (find[1].start, find[0]))
    runs: list[list[tuple[int, Entity]]] = []
    end = 0
    for find in numbered:
        if not runs or find[1].start >= end:
            runs.append([])
        runs[-1].append(find)
        end = max(end, find[1].end)
    return runs
