"""What counts as personal data in a text: the finds of one detector or of several, merged.

Source: Smirnov (arXiv 2412.06846): spaCy's `en_core_web_trf`, ignoring CARDINAL, DATE, PRODUCT and ORDINAL.
Deviations: where that pipeline is not installed, the demo's own small one serves, and the caller is told which one it is. Other spaCy
pipelines and `presidio` (cfgsafe/pii/presidio.py) can stand in its place or beside it: finds that overlap become one entity, kept when
anybody found it (union) or when more than half of the detectors did (vote).

Run it: python eval.py leak --model cfgsafe/demo/leaky --ner cfgsafe/demo/ner,presidio
"""

from collections.abc import Callable

from cfgsafe.errors import InputError
from cfgsafe.hub import DEMO_PIPELINE
from cfgsafe.pii.entities import Entity, merge

IGNORED = frozenset({"CARDINAL", "DATE", "PRODUCT", "ORDINAL"})
PAPER_PIPELINE = "en_core_web_trf"
PRESIDIO = "presidio"
COMBINATIONS = ("union", "vote")


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
        return [
            merge(text, [finds[number] for finds in found], self.needed) for number, text in enumerate(texts)
        ]


def default_pipeline() -> str:
    """The paper's pipeline if it is installed, else the demo's."""
    import spacy

    return PAPER_PIPELINE if spacy.util.is_package(PAPER_PIPELINE) else str(DEMO_PIPELINE)


def load_detector(name: str) -> Callable[[list[str]], list[list[Entity]]]:
    """The detector of one name; raises InputError."""
    if name == PRESIDIO:
        from cfgsafe.pii.presidio import Recognisers

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
            found.append(
                [
                    Entity(e.start_char, e.end_char, e.label_, e.text)
                    for e in doc.ents
                    if e.label_ not in IGNORED
                ]
            )
        return found
