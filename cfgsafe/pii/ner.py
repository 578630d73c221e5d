"""What counts as personal data in a text: the finds of one detector, or of several, merged.

Source: Smirnov (arXiv 2412.06846): spaCy's `en_core_web_trf`, without CARDINAL, DATE, PRODUCT and
ORDINAL.
Deviations: if that pipeline is not installed, the demo's own small one takes its place; results
name what was used, a pipeline also by its own name and version. Other spaCy pipelines, `presidio`
(cfgsafe/pii/presidio.py) and `structured` (cfgsafe/pii/structured.py) can replace or join it: finds that
overlap become one entity, kept if any detector found it (union) or more than half of them did (vote).

Run it: python eval.py leak --model cfgsafe/demo/leaky --ner cfgsafe/demo/ner,presidio
"""

from collections.abc import Callable
from pathlib import Path

from cfgsafe.errors import InputError
from cfgsafe.hub import DEMO_PIPELINE
from cfgsafe.identity import digest_of, file_digest
from cfgsafe.pii.entities import Entity, merge
from cfgsafe.pii.presidio import Recognisers
from cfgsafe.pii.structured import find_all

IGNORED = frozenset({"CARDINAL", "DATE", "PRODUCT", "ORDINAL"})
PAPER_PIPELINE = "en_core_web_trf"
PRESIDIO = "presidio"
STRUCTURED = "structured"
COMBINATIONS = ("union", "vote")


class Detector:
    """Finds personal data with one or several detectors.

    `names` are spaCy packages, folders, "presidio" or "structured", with commas between; None is
    `default_pipeline()`. Finds of spaCy with an `ignored` label are left out. The attribute `name` says
    what was loaded, as "folder (en_core_web_sm 3.8.0)". Raises InputError.
    """

    def __init__(self, names: str | None = None, combine: str = "union", ignored: frozenset[str] = IGNORED):
        if combine not in COMBINATIONS:
            raise InputError(f"--combine {combine}: must be one of {', '.join(COMBINATIONS)}")
        given = (default_pipeline() if names is None else names).split(",")
        self.parts = [load_detector(name.strip(), ignored) for name in given]
        loaded = []
        for name, part in zip(given, self.parts, strict=True):
            loaded.append(part.name if isinstance(part, Pipeline) else name.strip())
        self.name = ",".join(loaded)
        self.needed = len(self.parts) // 2 + 1 if combine == "vote" else 1

    def __call__(self, texts: list[str]) -> list[list[Entity]]:
        """The personal items of each text in their order; no two overlap."""
        found = [part(texts) for part in self.parts]
        merged = []
        for text, *finds in zip(texts, *found, strict=True):
            merged.append(merge(text, finds, self.needed))
        return merged


def is_single(names: str | None) -> bool:
    """Whether `names`, as `Detector` takes them, are one detector, so that there is nothing to combine."""
    return names is None or "," not in names


def default_pipeline() -> str:
    """The paper's pipeline if it is installed, else the demo's."""
    import spacy

    return PAPER_PIPELINE if spacy.util.is_package(PAPER_PIPELINE) else str(DEMO_PIPELINE)


def identity(names: str | None) -> str:
    """A digest of the detectors that `Detector` loads for `names`: of the files of their pipelines.

    Of what has no files, as presidio, it covers the name; what is unknown `Detector` refuses.
    """
    import spacy

    parts: list[object] = []
    for name in (default_pipeline() if names is None else names).split(","):
        name = name.strip()
        folder = Path(name)
        if not folder.is_dir() and spacy.util.is_package(name):
            folder = Path(spacy.util.get_package_path(name))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
        held = [(str(path.relative_to(folder)), file_digest(path)) for path in files]
        parts.append(held or name)
    return digest_of(parts)


def load_detector(name: str, ignored: frozenset[str]) -> Callable[[list[str]], list[list[Entity]]]:
    """The detector with that name. Raises InputError if it cannot be loaded."""
    if name == PRESIDIO:
        return Recognisers()
    if name == STRUCTURED:
        return find_all
    return Pipeline(name, ignored)


class Pipeline:
    """The entities of a spaCy pipeline, without those of `ignored` labels."""

    def __init__(self, name: str, ignored: frozenset[str]):
        import spacy

        self.ignored = ignored

        try:
            self.nlp = spacy.load(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--ner {name}: not a spaCy pipeline ({reason}); give a package name, a folder, "
                f"{PRESIDIO} or {STRUCTURED}"
            ) from None
        meta = self.nlp.meta
        own = f"{meta['lang']}_{meta['name']} {meta['version']}"
        self.name = f"{name} ({own})"

    def __call__(self, texts: list[str]) -> list[list[Entity]]:
        found = []
        for doc in self.nlp.pipe(texts):
            kept = [e for e in doc.ents if e.label_ not in self.ignored]
            found.append([Entity(e.start_char, e.end_char, e.label_, e.text) for e in kept])
        return found
