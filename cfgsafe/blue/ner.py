"""What counts as personal data in a text: spaCy's named entities outside the paper's ignored labels.

Source: Smirnov (arXiv 2412.06846): `en_core_web_trf`, ignoring CARDINAL, DATE, PRODUCT and ORDINAL.
Deviation: where that pipeline is not installed, the demo's own small one serves, and the caller is told which one it is.

Run it: python eval.py leak --model cfgsafe/demo/leaky --ner cfgsafe/demo/ner
"""

from dataclasses import dataclass
from pathlib import Path

from cfgsafe.errors import InputError

IGNORED = frozenset({"CARDINAL", "DATE", "PRODUCT", "ORDINAL"})
PAPER_PIPELINE = "en_core_web_trf"
DEMO_PIPELINE = Path(__file__).parents[1] / "demo" / "ner"


@dataclass(frozen=True)
class Entity:
    """A personal item found in a text: characters start..end, the pipeline's label, the words."""

    start: int
    end: int
    label: str
    text: str


class Detector:
    """Finds personal data. `pipeline` is a spaCy package or folder; None takes the paper's if installed, else the demo's."""

    def __init__(self, pipeline: str | None = None):
        import spacy

        if pipeline is None:
            pipeline = PAPER_PIPELINE if spacy.util.is_package(PAPER_PIPELINE) else str(DEMO_PIPELINE)
        try:
            self.nlp = spacy.load(pipeline)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--ner {pipeline}: not a spaCy pipeline ({str(error).splitlines()[0]}); give a package name or a folder"
            ) from None
        self.name = pipeline

    def __call__(self, texts: list[str]) -> list[list[Entity]]:
        """The personal items of each text."""
        found = []
        for doc in self.nlp.pipe(texts):
            found.append([Entity(e.start_char, e.end_char, e.label_, e.text) for e in doc.ents if e.label_ not in IGNORED])
        return found
