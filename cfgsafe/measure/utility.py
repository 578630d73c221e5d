"""What a model still knows: its answers to multiple-choice questions, under the same guidance.

Source: Smirnov (arXiv 2412.06846): zero-shot "Provide a short answer to the question: ..." on
MMLU-Pro (--protocol short), judged by GPT-4o-mini (--score judge); TIGER-Lab's 5-shot chain of
thought (--protocol cot5), see cfgsafe/measure/mmlu_pro.py; for models too small to choose from a
list, the question without its options (--protocol cloze), whose answer is the likeliest option, as
in Brown et al. (arXiv 2005.14165), section 2.4. --protocol open asks it so too, and looks for the words
of the right option in the answer. `refused` are the answers that refuse, see cfgsafe/measure/refusal.py.
The prompt of the short protocol is that of the paper's code: numbered options, one a line.
Deviations: a neutral system prompt, not an empty one. By default the score is exact: the
answer must give the right option, see cfgsafe/measure/grading.py, or for cot5 its letter. With --score
loglik, which cloze always has, the model writes nothing: its answer is the option most likely after
"The answer is", by the mean over the option's tokens; the margin by which the right option leads still
tells models apart that answer everything right.

Questions JSONL or parquet in MMLU-Pro's shape: {"question", "options", "answer_index"} a row;
options "N/A" are dropped. With --out FILE, answers are kept in FILE.kept and a judge's replies in
FILE.judge as they come, so that an interrupted run can continue.

Run it: python eval.py utility --model cfgsafe/demo/leaky
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from cfgsafe.errors import InputError, Unused, at
from cfgsafe.fields import Count, check_ranges
from cfgsafe.files import make_folder, write_jsonl
from cfgsafe.hub import QUIZ
from cfgsafe.llama import Llama
from cfgsafe.measure import judge, mmlu_pro
from cfgsafe.measure.grading import exact, exact_letter, exact_words
from cfgsafe.measure.intervals import Estimate, fault_interval, ratio_interval, share_interval, to_json
from cfgsafe.measure.mmlu_pro import Placed
from cfgsafe.measure.refusal import refused
from cfgsafe.measure.scoring import LEAST, check_fits, continuation_logprobs, impossible
from cfgsafe.outputs import File, InputPath
from cfgsafe.remote import SERVICE, Service, check_service
from cfgsafe.subject import ANSWER_TOKENS, Answer, Subject, answers, load, request_for
from cfgsafe.tokenizer import Messages, Tokenizer

INSTRUCTION = "Provide a short answer to the question: "
SYSTEM = "You are a helpful assistant."
LEAD = "The answer is"  # stands before each option: chat models seldom begin with the bare option
LOGLIK = "loglik"
LONGEST = {"short": ANSWER_TOKENS, "open": ANSWER_TOKENS, "cot5": 2048}  # tokens of an answer
GRADES = {"short": exact, "open": exact_words, "cot5": exact_letter}

Scored = tuple[dict, list[dict]]  # figures of all questions, and the columns that each row gets


@dataclass
class Options(Subject):
    """Score a model's answers to multiple-choice questions."""

    questions: InputPath = QUIZ
    """JSONL or parquet file, mmlu-pro/validation or mmlu-pro/test; default: the demo's quiz."""
    protocol: Literal["short", "cot5", "cloze", "open"] = "short"
    """short: zero-shot, short answers. cot5: TIGER-Lab's five examples and chain of thought. cloze:
    the options are not shown, and their likelihood decides. open: not shown, and the answer must name
    the right one."""
    shots: InputPath = "mmlu-pro/validation"
    """Source of the worked examples for cot5: a file or name, as for --questions."""
    score: Literal["exact", "loglik", "judge"] | None = None
    """exact: option, line or letter given. loglik: the likeliest option. judge: verdict of --remote-model.
    Default: exact, for cloze loglik."""
    service: tyro.conf.OmitArgPrefixes[Service] = field(default_factory=Service)
    """Endpoint of the judge."""
    out: Annotated[str, File(("{name}.kept", "{name}.judge"))] | None = None
    """JSONL file for the answers and their scores."""
    limit: Count | None = None
    """Use only the first questions."""
    max_new_tokens: Count | None = None
    """Longest answer, in tokens; default: 256, for cot5 2048."""

    @property
    def scored(self) -> str:
        """--score, or the default of the protocol."""
        return self.score or (LOGLIK if self.protocol == "cloze" else "exact")

    def unused(self) -> Unused:
        """See `Subject.unused`."""
        yield from super().unused()
        if self.score != "judge":
            yield "without --score judge", *SERVICE
        if self.scored == LOGLIK:
            yield "with --score loglik, which writes nothing", "max_new_tokens"
        else:
            yield from self.unused_if_greedy()
        if self.protocol != "cot5":
            yield "without --protocol cot5", "shots"


def run(options: Options) -> None:
    check_options(options)
    placed = mmlu_pro.read(options.questions)[: options.limit]
    asked = conversations(placed, options)
    if options.out:
        make_folder(Path(options.out).parent)
    model, tokenizer = load(options)
    measure = by_likelihood if options.scored == LOGLIK else by_answer
    figures, columns = measure(options, model, tokenizer, placed, asked)
    if options.out:
        rows = [{**row, **column} for (_, row), column in zip(placed, columns, strict=True)]
        write_jsonl(options.out, rows)
    settings = {"protocol": options.protocol, "score": options.scored, **options.guarded}
    print(json.dumps({"questions": len(placed), **settings, **figures}))


def check_options(options: Options) -> None:
    """Raise InputError for options that do not go together."""
    check_ranges(options)
    if options.protocol == "cloze" and options.scored != LOGLIK:
        raise InputError(
            f"--score {options.score}: --protocol cloze shows no options to choose from, and scores them by "
            "likelihood; leave out --score"
        )
    if options.score == LOGLIK and options.protocol == "cot5":
        raise InputError(
            "--score loglik: a chain of thought has no fixed answer to score; use --protocol short"
        )
    if options.score == LOGLIK and options.protocol == "open":
        raise InputError("--score loglik: of options that are not shown is --protocol cloze")
    if options.score == "judge" and not (options.service.remote_model and options.out):
        raise InputError(
            "--score judge: needs --remote-model NAME, the judge, and --out FILE, "
            "beside which its replies are kept"
        )
    if options.score == "judge":
        check_service(options.service)


def read_questions(path: str) -> list[dict]:
    """The questions that --questions names. Raises InputError naming line and field."""
    return [row for _, row in mmlu_pro.read(path)]


def conversations(placed: Placed, options: Options) -> list[Messages]:
    """A conversation for each question. Raises InputError if the examples do not suit it."""
    if options.protocol == "short":
        return [conversation(row) for _, row in placed]
    if options.protocol in ("cloze", "open"):
        return [bare(row) for _, row in placed]
    shots = mmlu_pro.read_shots(options.shots)
    return [_chat(text) for text in mmlu_pro.cot_prompts(placed, shots)]


def prompt(row: dict) -> str:
    """The user's message of the short protocol: the paper's instruction, the question, numbered options.

    One option a line, because real options hold commas.
    """
    return f"{INSTRUCTION}{row['question']}\nOptions:\n{mmlu_pro.numbered(row['options'])}"


def conversation(row: dict) -> Messages:
    """The short protocol's conversation."""
    return _chat(prompt(row))


def bare(row: dict) -> Messages:
    """The question without its options."""
    return _chat(INSTRUCTION + row["question"])


def by_answer(
    options: Options, model: Llama, tokenizer: Tokenizer, placed: Placed, asked: list[Messages]
) -> Scored:
    """Answers scored exactly or by the judge, in percent.

    Raises InputError or ContextError if a question cannot be asked or the judge refuses.
    """
    rows, places = [row for _, row in placed], [place for place, _ in placed]
    kept = Path(f"{options.out}.kept") if options.out else None
    longest = options.max_new_tokens or LONGEST[options.protocol]
    given = answers(options, model, tokenizer, asked, "quiz", longest, places, kept)
    texts = [answer.text for answer in given]
    grades = [GRADES[options.protocol](text, row) for row, text in zip(rows, texts, strict=True)]
    columns: list[dict] = []
    for answer, right in zip(given, grades, strict=True):
        columns.append({"model_answer": answer.text, "cut": answer.cut, "correct": bool(right)})
    percentage = share_interval([bool(right) for right in grades])
    unparsed = share_interval([right is None for right in grades])
    others = {"unparsed": unparsed, "refused": refused(given)}
    others |= {"cut_off": cut_off(given), "no_answer": no_answer(given)}
    if options.scored == "exact":
        return to_json({"utility": percentage, **others}), columns
    verdicts = judge.judge(rows, texts, judge.remote(options.service, Path(f"{options.out}.judge")))
    for column, verdict in zip(columns, verdicts, strict=True):
        column["verdict"] = verdict
    estimates, agreement = judge.summarise(verdicts, grades)
    return to_json({**estimates, "exact": percentage, **others}) | agreement, columns


def by_likelihood(
    options: Options, model: Llama, tokenizer: Tokenizer, placed: Placed, asked: list[Messages]
) -> Scored:
    """Questions whose right option is the most likely, in percent.

    Options are compared by the mean over their tokens, and by the sum for comparison. Raises
    InputError or ContextError naming the question that cannot be scored.
    """
    logprobs = option_logprobs(options, model, tokenizer, placed, asked)
    columns = []
    for (_, row), parts in zip(placed, logprobs, strict=True):
        means = [part.mean().item() for part in parts]
        by_mean, by_sum = likeliest(means), likeliest([part.sum().item() for part in parts])
        column = {
            "option_logprobs": [round(mean, 4) if math.isfinite(mean) else None for mean in means],
            "correct": by_mean == row["answer_index"],
            "correct_by_sum": by_sum == row["answer_index"],
            "decided": by_mean is not None,
            "margin": round(margin(parts, row["answer_index"]), 4),
        }
        columns.append(column)
    figures = {
        "utility": share_interval([column["correct"] for column in columns]),
        "utility_by_sum": share_interval([column["correct_by_sum"] for column in columns]),
        "undecided": share_interval([not column["decided"] for column in columns]),
        "margin": ratio_interval([column["margin"] for column in columns]),
        "impossible": impossible([torch.cat(parts) for parts in logprobs]),
    }
    return to_json(figures), columns


def option_logprobs(
    subject: Subject, model: Llama, tokenizer: Tokenizer, placed: Placed, asked: list[Messages]
) -> list[list[Tensor]]:
    """For each question the guided log-probabilities (tokens,) of each option after `LEAD`.

    The options of all questions are computed `subject.batch` at a time. Raises InputError or
    ContextError naming the question that cannot be scored.
    """
    requests, texts = [], []
    for (place, row), messages in zip(placed, asked, strict=True):
        with at(place):
            request = request_for(subject, tokenizer, [*messages, {"role": "assistant", "content": LEAD}])
        for option in row["options"]:
            text = tokenizer.encode(f" {mmlu_pro.one_line(option)}")
            check_fits(model, request, text, place)
            requests.append(request)
            texts.append(text)
    of_all = iter(continuation_logprobs(model, requests, texts, batch=subject.batch, desc="options"))
    return [[next(of_all) for _ in row["options"]] for _, row in placed]


def margins(subject: Subject, model: Llama, tokenizer: Tokenizer, rows: list[dict]) -> list[float]:
    """`margin` of each question in the short protocol. Raises InputError or ContextError."""
    placed = [(f"question {number}", row) for number, row in enumerate(rows, start=1)]
    asked = [conversation(row) for row in rows]
    found = option_logprobs(subject, model, tokenizer, placed, asked)
    return [margin(parts, row["answer_index"]) for row, parts in zip(rows, found, strict=True)]


def margin(parts: list[Tensor], right: int) -> float:
    """The right option's mean log-probability less that of the best wrong one, in nats per token.

    `parts` are the log-probabilities (tokens,) of each option. No token counts as less likely than
    `LEAST`, so the margin lies within 20.8 nats even if guidance makes an option impossible.
    """
    means = [part.clamp(min=LEAST).mean().item() for part in parts]
    return means.pop(right) - max(means)


def likeliest(logprobs: list[float]) -> int | None:
    """Index of the highest; None for a tie, also if guidance makes all options impossible."""
    best = max(logprobs)
    return logprobs.index(best) if best > -math.inf and logprobs.count(best) == 1 else None


def grades(rows: list[dict], texts: list[str]) -> list[bool]:
    """Whether each short answer is right."""
    return [bool(exact(text, row)) for row, text in zip(rows, texts, strict=True)]


def score(rows: list[dict], texts: list[str]) -> Estimate | None:
    """Percentage of right short answers."""
    return share_interval(grades(rows, texts))


def over_refusal(
    subject: Subject, model: Llama, tokenizer: Tokenizer, rows: list[dict], max_new_tokens: int = 64
) -> dict[str, Estimate | None]:
    """Percentages of harmless questions, asked without their options: refused, and right option named.

    `rows` in MMLU-Pro's shape. Figures: refused, of the answers that came; named, cut_off and no_answer, of
    all. Raises InputError or ContextError naming the question that cannot be asked.
    """
    asked = [bare(row) for row in rows]
    given = answers(subject, model, tokenizer, asked, "harmless question", max_new_tokens)
    named = [exact_words(answer.text, row) for answer, row in zip(given, rows, strict=True)]
    return {
        "refused": refused(given),
        "named": share_interval([bool(right) for right in named]),
        "cut_off": cut_off(given),
        "no_answer": no_answer(given),
    }


def cut_off(given: list[Answer]) -> Estimate | None:
    """Percentage of answers that the limit of tokens cut off."""
    return share_interval([answer.cut for answer in given])


def no_answer(given: list[Answer]) -> Estimate | None:
    """Percentage of questions without an answer, which count as not right; None where there are none."""
    return fault_interval([answer.broken for answer in given])


def _chat(text: str) -> Messages:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
