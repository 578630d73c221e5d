"""What counts as personal data in a text: the finds of one detector or of several, merged.

Source: Smirnov (arXiv 2412.06846): spaCy's `en_core_web_trf`, ignoring CARDINAL, DATE, PRODUCT and ORDINAL.
Deviations: where that pipeline is not installed, the demo's own small one serves, and the caller is told which one it is. Other spaCy
pipelines and `presidio` (cfgsafe/blue/presidio.py) can stand in its place or beside it: finds that overlap become one entity, kept when
anybody found it (union) or when more than half of the detectors did (vote).

Run it: python eval.py leak --model cfgsafe/demo/leaky --ner cfgsafe/demo/ner,presidio
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.errors import InputError

IGNORED = frozenset({"CARDINAL", "DATE", "PRODUCT", "ORDINAL"})
PAPER_PIPELINE = "en_core_web_trf"
DEMO_PIPELINE = Path(__file__).parents[1] / "demo" / "ner"
PRESIDIO = "presidio"
COMBINATIONS = ("union", "vote")


@dataclass(frozen=True)
class Entity:
    """A personal item found in a text: characters start..end, the detector's label, the words."""

    start: int
    end: int
    label: str
    text: str


class Detector:
    """Finds personal data. `names`: spaCy packages, folders or "presidio", with commas between.

    None takes the paper's pipeline if it is installed, else the demo's; `name` says what was loaded. Raises InputError.
    """

    def __init__(self, names: str | None = None, combine: str = "union"):
        if combine not in COMBINATIONS:
            raise InputError(f"--combine {combine}: must be one of {', '.join(COMBINATIONS)}")
        self.name = default_pipeline() if names is None else names
        self.parts = [load_detector(name.strip()) for name in self.name.split(",")]
        self.needed = len(self.parts) // 2 + 1 if combine == "vote" else 1

    def __call__(self, texts: list[str]) -> list[list[Entity]]:
        """The personal items of each text, in order, none overlapping another."""
        found = [part(texts) for part in self.parts]
        return [merge(text, [finds[number] for finds in found], self.needed) for number, text in enumerate(texts)]


def merge(text: str, finds: list[list[Entity]], needed: int = 1) -> list[Entity]:
    """One entity for each run of overlapping finds that at least `needed` detectors share in; finds[i] are those of detector i.

    It reaches from the first character found to the last and has the label of the longest find, of the first detector where two tie.

    >>> merge("Ann Lee", [[Entity(0, 3, "PERSON", "Ann")], [Entity(0, 7, "NAME", "Ann Lee")]])
    [Entity(start=0, end=7, label='NAME', text='Ann Lee')]
    """
    runs: list[list[tuple[int, Entity]]] = []
    end = 0
    for number, entity in sorted(((n, e) for n, some in enumerate(finds) for e in some), key=lambda find: (find[1].start, find[0])):
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


def default_pipeline() -> str:
    """The paper's pipeline if it is installed, else the demo's."""
    import spacy

    return PAPER_PIPELINE if spacy.util.is_package(PAPER_PIPELINE) else str(DEMO_PIPELINE)


def load_detector(name: str) -> Callable[[list[str]], list[list[Entity]]]:
    """The detector of one name; raises InputError."""
    if name == PRESIDIO:
        from cfgsafe.blue.presidio import Recognisers

        return Recognisers()
    return Pipeline(name)


class Pipeline:
    """A spaCy pipeline's entities, without the labels that the paper ignores."""

    def __init__(self, name: str):
        import spacy

        try:
            self.nlp = spacy.load(name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--ner {name}: not a spaCy pipeline ({str(error).splitlines()[0]}); give a package name, a folder or {PRESIDIO}"
            ) from None

    def __call__(self, texts: list[str]) -> list[list[Entity]]:
        found = []
        for doc in self.nlp.pipe(texts):
            found.append([Entity(e.start_char, e.end_char, e.label_, e.text) for e in doc.ents if e.label_ not in IGNORED])
        return found
