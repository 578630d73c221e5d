"""TODO."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entity:
    """A personal item found in a text: characters start..end, the detector's label, the words."""

    start: int
    end: int
    label: str
    text: str


def merge(text: str, finds: list[list[Entity]], needed: int = 1) -> list[Entity]:
    """One entity for each run of overlapping finds that at least `needed` detectors share in; finds[i] are those of detector i.

    It reaches from the first character found to the last and has the label of the longest find, of the first detector where two tie.

    >>> merge("Ann Lee", [[Entity(0, 3, "PERSON", "Ann")], [Entity(0, 7, "NAME", "Ann Lee")]])
    [Entity(start=0, end=7, label='NAME', text='Ann Lee')]
    """
    runs: list[list[tuple[int, Entity]]] = []
    end = 0
    for number, entity in sorted(
        ((n, e) for n, some in enumerate(finds) for e in some), key=lambda find: (find[1].start, find[0])
    ):
        if not runs or entity.start >= end:
            runs.append([])
        runs[-1].append((number, entity))
        end = max(end, entity.end)
    merged = []
    for run in runs:
        if len({number for number, _ in run}) >= needed:
            start, end = min(e.start for _, e in run), max(e.end for _, e in run)
            _, longest = min(run, key=lambda find: (find[1].start - find[1].end, find[0]))
            merged.append(Entity(start, end, longest.label, text[start:end]))
    return merged
