"""Personal data that has a form: e-mail, phone, credit card, US social security number, IP address, URL.

Source: Microsoft's presidio-analyzer and its predefined recognisers.
Deviations: those six are called one by one, without the analyzer's NLP engine, which would download a model, and so without its bonus for
context words; every find counts, whatever its score. E-mail addresses are checked against the list of public suffixes that tldextract
brings along, where presidio would fetch a new one.

Run it: python eval.py detectors --ner presidio
"""

from cfgsafe.errors import InputError
from cfgsafe.pii.entities import Entity, merge


class Recognisers:
    """Presidio's structured recognisers; labels are presidio's. Raises InputError where the package is missing."""

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

        others = (
            "PhoneRecognizer",
            "CreditCardRecognizer",
            "UsSsnRecognizer",
            "IpRecognizer",
            "UrlRecognizer",
        )
        self.recognisers = [Email(), *(getattr(presidio, name)() for name in others)]

    def __call__(self, texts: list[str]) -> list[list[Entity]]:
        return [merge(text, [self._find(text)]) for text in texts]

    def _find(self, text: str) -> list[Entity]:
        finds = [find for one in self.recognisers for find in one.analyze(text, one.supported_entities, None)]
        return [Entity(find.start, find.end, find.entity_type, text[find.start : find.end]) for find in finds]
