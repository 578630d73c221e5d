"""Personal data with a fixed form: e-mail, phone, credit card, US social security number, IP, URL.

Source: Microsoft's presidio-analyzer and its predefined recognisers.
Deviations: those six are called directly, without the analyzer's NLP engine, which would download
a model. So no score gets a bonus for context words, and every find counts, whatever its score.
E-mail addresses are checked against the list of public suffixes that comes with tldextract;
presidio would fetch a new one.

Run it: python eval.py detectors --ner presidio
"""

from cfgsafe.errors import InputError
from cfgsafe.pii.entities import Entity, merge

OTHERS = ("PhoneRecognizer", "CreditCardRecognizer", "UsSsnRecognizer", "IpRecognizer", "UrlRecognizer")


class Recognisers:
    """Presidio's recognisers, with presidio's labels. Raises InputError without the package."""

    def __init__(self):
        try:
            from presidio_analyzer import predefined_recognizers as presidio
            from tldextract import TLDExtract
        except ImportError as error:
            raise InputError(
                f"--ner presidio: cannot be imported ({error}); pip install 'cfgsafe[presidio]'"
            ) from None

        suffixes = TLDExtract(suffix_list_urls=(), cache_dir=None)

        class Email(presidio.EmailRecognizer):
            def validate_result(self, pattern_text: str) -> bool:
                return bool(suffixes(pattern_text).fqdn)

        self.recognisers = [Email(), *(getattr(presidio, name)() for name in OTHERS)]

    def __call__(self, texts: list[str]) -> list[list[Entity]]:
        """The personal items of each text in their order; no two overlap."""
        return [merge(text, [self._find(text)]) for text in texts]

    def _find(self, text: str) -> list[Entity]:
        found = []
        for recogniser in self.recognisers:
            for find in recogniser.analyze(text, recogniser.supported_entities, None):
                words = text[find.start : find.end]
                found.append(Entity(find.start, find.end, find.entity_type, words))
        return found
