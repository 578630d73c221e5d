"""The same prompts and questions for one model after another; each model gives a row of figures.

Source: the columns of Smirnov's Tables 1 and 2 (arXiv 2412.06846).
Deviations: answers to questions go through the model's guidance as well (in the paper's code they did
not); leaks are counted by gold items as well as by NER; there are two measures of fluency.

Run it: python eval.py sweep --help
"""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.files import make_folder
from cfgsafe.identity import identity
from cfgsafe.llama import Llama
from cfgsafe.measure import fluency, leak, utility
from cfgsafe.measure.intervals import ratio_interval, share_interval, to_json
from cfgsafe.pii.ner import Detector
from cfgsafe.report import results
from cfgsafe.subject import ANSWER_TOKENS, Answer, Subject, answers, load
from cfgsafe.tokenizer import Messages, Tokenizer

PRINTED = ("leaked_per_100", "ner_items_per_100", "utility", "broken_words", "perplexity")


@dataclass(frozen=True)
class Measured:
    """What a row was counted from: the finding of each prompt, and for each question whether it was right."""

    findings: list[leak.Finding]
    grades: list[bool]


class Comparison:
    """Puts the same prompts and questions to every model; writes the answers into the folder `out`.

    `reference` is the model that gives the perplexity of answers; without it there is none.
    `vocabulary`: lower-case words that are not broken; by default those of prompts and questions.
    With `margins`, a row tells how far the right options of the questions lead, see `utility.margin`.
    With `resume`, answers are kept in `out`/kept, for a later comparison of the same weights.
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
        margins: bool = False,
        resume: bool = True,
        answer_tokens: int = ANSWER_TOKENS,
        quiz_tokens: int = ANSWER_TOKENS,
    ):
        self.prompts, self.questions, self.detector, self.out = prompts, questions, detector, out
        self.reference = load(reference) if reference else None
        self.vocabulary = words_of(prompts, questions) if vocabulary is None else vocabulary
        self.margins = margins
        self.kept = make_folder(out / "kept") if resume else None
        self.answer_tokens, self.quiz_tokens = answer_tokens, quiz_tokens
        self.measured: dict[str, Measured] = {}  # the row's name -> its answers and grades
        self.loaded: tuple[tuple, Llama, Tokenizer] | None = None  # its weights, device and dtype; itself

    def row(self, name: str, subject: Subject, epoch: int | None = None, seed: int | None = None) -> dict:
        """A row of results.json; the answers go to `results.answers_file(row)`.

        Raises InputError, CheckpointError, ContextError.
        """
        alpha = None if subject.guidance is None else subject.alpha
        row = {"model": name, "seed": seed, "epoch": epoch, **subject.guarded, "alpha": alpha}
        title = results.name_of(row)
        chats = [prompt.messages for prompt in self.prompts]
        places = [prompt.place for prompt in self.prompts]
        given = self.ask(subject, chats, f"{title}: answers", self.answer_tokens, places)
        asked = [utility.conversation(question) for question in self.questions]
        quiz = self.ask(subject, asked, f"{title}: quiz", self.quiz_tokens)
        findings = leak.inspect(self.prompts, given, self.detector)
        leak.write_findings(self.out / results.answers_file(row), findings)
        grades = utility.grades(self.questions, [answer.text for answer in quiz])
        self.measured[title] = Measured(findings, grades)
        whole = leak.answered(findings)
        texts, chats = [f.answer for f in whole], [f.prompt.messages for f in whole]
        clusters = [f.cluster for f in whole]
        estimates = {
            "utility": share_interval(grades),
            "quiz_cut_off": utility.cut_off(quiz),
            "quiz_no_answer": utility.no_answer(quiz),
            "broken_words": fluency.broken_words(texts, chats, self.vocabulary, clusters),
        }
        if self.margins:
            leads = utility.margins(subject, *self.opened(subject), self.questions)
            estimates["margin"] = ratio_interval(leads)
        if self.reference:
            estimates["perplexity"] = fluency.perplexity(*self.reference, texts, chats, clusters)
        row |= leak.figures(findings) | to_json(estimates) | {"slices": leak.by_slice(findings)}
        print(f"  {title}: {line_of(row)}", flush=True)
        return row

    def ask(
        self, subject: Subject, chats: list[Messages], what: str, tokens: int, places: list[str] | None = None
    ) -> list[Answer]:
        """Greedy answers through the subject's guidance."""
        kept = self.kept / f"{identity(subject.model, subject.adapter)}.jsonl" if self.kept else None
        return answers(subject, *self.opened(subject), chats, what, tokens, places, kept)

    def opened(self, subject: Subject) -> tuple[Llama, Tokenizer]:
        """The subject's model, which stays loaded until another one is asked for, and its tokenizer."""
        key = (identity(subject.model, subject.adapter), subject.device, subject.dtype)
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # release the last model before the next one is loaded
            self.loaded = (key, *load(subject))
        return self.loaded[1:]

    def examples(self) -> list[str]:
        """Markdown: the first prompt of each kind with every model's answer."""
        lines: list[str] = []
        seen = set()
        for number, prompt in enumerate(self.prompts):
            kind = prompt.kind.split(" ")[0]  # canaries of every count together
            if kind not in seen:
                seen.add(kind)
                lines += [f"**{kind}**", ""]
                lines += [f"> {message['role']}: {message['content']}  " for message in prompt.messages[1:]]
                lines.append("")
                for title, measured in self.measured.items():
                    lines.append(f"- {title}: {measured.findings[number].answer.strip()}")
                lines.append("")
        return lines


def words_of(prompts: list[leak.Prompt], questions: list[dict]) -> frozenset[str]:
    """The words of the conversations, of the questions and of their options, in lower case."""
    texts = [utility.prompt(question) for question in questions]
    for prompt in prompts:
        texts += [message["content"] for message in prompt.messages]
    return frozenset(word.lower() for word in fluency.words("\n".join(texts)))


def line_of(row: dict) -> str:
    """The most important figures of a row, on one line."""
    return ", ".join(f"{key} {row[key]:.1f}" for key in PRINTED if key in row)
