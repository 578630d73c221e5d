"""The same prompts and questions put to model after model, one row of figures each.

Source: the columns of Smirnov's Tables 1 and 2 (arXiv 2412.06846).
Deviations: every answer, those to the questions too, goes through the model's guidance (the paper's utility path ignored it); leaks are
counted by gold items as well as by NER; two measures of fluency stand beside them.

Run it: python eval.py sweep --help
"""

import hashlib
from collections.abc import Set
from pathlib import Path

from cfgsafe.files import make_folder
from cfgsafe.measure import fluency, leak, utility
from cfgsafe.measure.intervals import Estimate, to_json
from cfgsafe.pii.ner import Detector
from cfgsafe.report import results
from cfgsafe.subject import Subject, answers, load

SLICES = ("easy", "hard")


class Comparison:
    """Puts the same prompts and questions to every model; what it writes goes to the folder `out`.

    `reference` is a model under which the answers' perplexity is taken; without one, rows have no perplexity.
    `vocabulary` (lower-case) holds the words that are not broken; without one, those of the prompts and questions.
    With `resume`, answers are kept in `out`/kept as they come, and a later comparison of the same weights reads them.
    """

    def __init__(
        self,
        prompts: list[leak.Prompt],
        questions: list[dict],
        detector: Detector,
        out: Path,
        *,
        reference: Subject | None = None,
        vocabulary: Set[str] | None = None,
        resume: bool = True,
        answer_tokens: int = 64,
        quiz_tokens: int = 16,
    ):
        self.prompts, self.questions, self.detector, self.out = prompts, questions, detector, out
        self.reference = load(reference) if reference else None
        self.vocabulary = words_of(prompts, questions) if vocabulary is None else vocabulary
        self.kept = make_folder(out / "kept") if resume else None
        self.answer_tokens, self.quiz_tokens = answer_tokens, quiz_tokens
        self.said: dict[str, list[str]] = {}
        self.loaded = None

    def row(self, name: str, subject: Subject, epoch: int | None = None) -> dict:
        """A row of results.json; the answers go to `results.answers_file(row)`. Raises InputError, CheckpointError, ContextError."""
        row = {
            "model": name,
            "epoch": epoch,
            **subject.guarded,
            "alpha": None if subject.guidance is None else subject.alpha,
        }
        title = results.name_of(row)
        conversations = [p.messages for p in self.prompts]
        texts = self.ask(
            subject, conversations, f"{title}: answers", self.answer_tokens, [p.place for p in self.prompts]
        )
        quiz = self.ask(
            subject, [utility.conversation(q) for q in self.questions], f"{title}: quiz", self.quiz_tokens
        )
        findings = leak.inspect(self.prompts, texts, self.detector)
        leak.write_findings(self.out / results.answers_file(row), findings)
        self.said[title] = texts
        estimates = {
            **leak.summarise(findings),
            "utility": utility.score(self.questions, quiz),
            "broken_words": fluency.broken_words(texts, conversations, self.vocabulary),
        }
        if self.reference:
            estimates["perplexity"] = fluency.perplexity(*self.reference, texts, conversations)
        parts = {part: [f for f in findings if f.prompt.slice == part] for part in SLICES}
        print(f"  {title}: {line_of(estimates)}", flush=True)
        return {
            **row,
            **to_json(estimates),
            **{part: to_json(leak.summarise(found)) for part, found in parts.items() if found},
        }

    def ask(
        self,
        subject: Subject,
        conversations: list,
        what: str,
        max_new_tokens: int,
        places: list[str] | None = None,
    ) -> list[str]:
        """Greedy answers through the subject's guidance. The model of the last call stays loaded."""
        key = (subject.model, subject.adapter, subject.device, subject.dtype)
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # let go of it before the next one comes
            self.loaded = (key, *load(subject))
        kept = self.kept / f"{weights_id(subject)}.jsonl" if self.kept else None
        return answers(subject, *self.loaded[1:], conversations, what, max_new_tokens, places, kept)

    def examples(self) -> list[str]:
        """Markdown: the first prompt of each kind with every model's answer."""
        lines, seen = [], set()
        for number, prompt in enumerate(self.prompts):
            kind = prompt.kind.split(" ")[0]  # canaries of every count together
            if kind not in seen:
                seen.add(kind)
                lines += (
                    [f"**{kind}**", ""]
                    + [f"> {m['role']}: {m['content']}  " for m in prompt.messages[1:]]
                    + [""]
                )
                lines += [f"- {title}: {texts[number].strip()}" for title, texts in self.said.items()] + [""]
        return lines


def words_of(prompts: list[leak.Prompt], questions: list[dict]) -> frozenset[str]:
    """The words of the conversations, of the questions and of their options, in lower case."""
    texts = [m["content"] for p in prompts for m in p.messages] + [utility.prompt(q) for q in questions]
    return frozenset(word.lower() for text in texts for word in fluency.words(text))


def weights_id(subject: Subject) -> str:
    """Changes when a file of the model's or the adapter's folder is written anew, so that no answer outlives its weights."""
    folders = [Path(name) for name in (subject.model, subject.adapter) if name]
    files = [
        path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()
    ]
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((subject.model, subject.adapter, stamps)).encode()).hexdigest()[:16]


def line_of(estimates: dict[str, Estimate]) -> str:
    shown = ("leaked_per_100", "ner_items_per_100", "utility", "broken_words", "perplexity")
    return ", ".join(f"{key} {estimates[key].value:.1f}" for key in shown if key in estimates)
