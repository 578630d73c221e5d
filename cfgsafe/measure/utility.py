"""What a model still knows: answers to multiple-choice questions, under the same guidance as everything else.

Source: Smirnov (arXiv 2412.06846): zero-shot "Provide a short answer to the question: ..." on MMLU-Pro (--protocol short), judged by
GPT-4o-mini (--score judge); TIGER-Lab's 5-shot chain of thought (--protocol cot5), see cfgsafe/measure/mmlu_pro.py.
Deviations: the options stand in the prompt of the short protocol. By default the score is exact: the answer names the right option and no
other one, or for cot5 its letter. --score loglik lets the model write nothing: the option likeliest after "The answer is", by the mean
over its tokens, counts as its answer.

Questions JSONL or parquet in MMLU-Pro's shape: {"question", "options", "answer_index"} a row; options "N/A" are dropped.
With --out FILE, answers are kept in FILE.kept as they come, and replies of a judge in FILE.judge: a run that was killed goes on.

Run it: python eval.py utility --model cfgsafe/demo/leaky
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from torch import Tensor
from tqdm import tqdm

from cfgsafe.errors import InputError, check_at_least
from cfgsafe.files import make_folder, write_jsonl
from cfgsafe.hub import QUIZ
from cfgsafe.llama import Llama
from cfgsafe.measure import judge, mmlu_pro
from cfgsafe.measure.intervals import Estimate, mean_interval, to_json
from cfgsafe.measure.mmlu_pro import Placed
from cfgsafe.measure.scoring import check_fits, continuation_logprobs
from cfgsafe.pii.matching import mentions
from cfgsafe.remote import Service, check_service
from cfgsafe.subject import Subject, answers, load, request_for
from cfgsafe.tokenizer import Messages, Tokenizer

INSTRUCTION = "Provide a short answer to the question: "
SYSTEM = "You are a helpful assistant."
LEAD = "The answer is"  # what --score loglik puts before each option: chat models seldom begin with the bare option
LONGEST = {"short": 64, "cot5": 2048}  # tokens of an answer


@dataclass
class Options(Subject):
    """Score a model's answers to multiple-choice questions."""

    questions: str = QUIZ
    """JSONL or parquet in MMLU-Pro's shape, or mmlu-pro/validation or mmlu-pro/test from the hub; by default the demo's held-out quiz."""
    protocol: Literal["short", "cot5"] = "short"
    """short: zero-shot, a short answer. cot5: TIGER-Lab's five worked examples and chain of thought."""
    shots: str = "mmlu-pro/validation"
    """Where cot5 takes the examples from, as for --questions."""
    score: Literal["exact", "loglik", "judge"] = "exact"
    """exact: the option named, or the letter. loglik: the likeliest option's text, no answer needed. judge: by the --remote-model."""
    service: tyro.conf.OmitArgPrefixes[Service] = field(default_factory=Service)
    """The judge's endpoint."""
    out: str | None = None
    """JSONL for the answers and their scores."""
    limit: int | None = None
    """Use the first questions only."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; by default what the protocol needs."""


def run(options: Options) -> None:
    check_options(options)
    placed = mmlu_pro.read(options.questions)[: options.limit]
    asked = conversations(placed, options)
    if options.out:
        make_folder(Path(options.out).parent)
    model, tokenizer = load(options)
    measure = by_likelihood if options.score == "loglik" else by_answer
    figures, columns = measure(options, model, tokenizer, placed, asked)
    if options.out:
        write_jsonl(
            options.out, [{**row, **column} for (_, row), column in zip(placed, columns, strict=True)]
        )
    settings = {"protocol": options.protocol, "score": options.score, **options.guarded}
    print(json.dumps({"questions": len(placed), **settings, **figures}))


def check_options(options: Options) -> None:
    """Raise InputError for options that do not go together."""
    check_at_least(1, options, "limit", "max_new_tokens")
    if options.score == "loglik" and options.protocol == "cot5":
        raise InputError(
            "--score loglik: a chain of thought has no fixed answer to score; use --protocol short"
        )
    if options.score == "judge" and not (options.service.remote_model and options.out):
        raise InputError(
            "--score judge: needs --remote-model NAME, the judge, and --out FILE, beside which its replies are kept"
        )
    if options.score == "judge":
        check_service(options.service)


def read_questions(path: str) -> list[dict]:
    """The questions that --questions names, without their places. Raises InputError naming line and field."""
    return [row for _, row in mmlu_pro.read(path)]


def conversations(placed: Placed, options: Options) -> list[Messages]:
    """What is asked, by the protocol. Raises InputError where the examples do not serve a question."""
    if options.protocol == "short":
        return [conversation(row) for _, row in placed]
    prompts = mmlu_pro.cot_prompts(placed, mmlu_pro.read_shots(options.shots))
    return [_chat(prompt) for prompt in prompts]


def prompt(row: dict) -> str:
    """The user's message of the short protocol: the paper's instruction, the question, the options."""
    return f"{INSTRUCTION}{row['question']} Options: {', '.join(row['options'])}."


def conversation(row: dict) -> Messages:
    """The short protocol's conversation."""
    return _chat(prompt(row))


def by_answer(
    options: Options, model: Llama, tokenizer: Tokenizer, placed: Placed, asked: list[Messages]
) -> tuple[dict[str, object], list[dict]]:
    """(figures, columns for each row): answers, scored exactly or by the judge."""
    rows = [row for _, row in placed]
    kept = Path(f"{options.out}.kept") if options.out else None
    longest = options.max_new_tokens or LONGEST[options.protocol]
    texts = answers(options, model, tokenizer, asked, "quiz", longest, [place for place, _ in placed], kept)
    grade = exact if options.protocol == "short" else exact_letter
    grades = [grade(text, row) for row, text in zip(rows, texts, strict=True)]
    columns = [
        {"model_answer": text, "correct": bool(grade)} for text, grade in zip(texts, grades, strict=True)
    ]
    percentage = mean_interval([100 * bool(grade) for grade in grades])
    unparsed = mean_interval([100 * (grade is None) for grade in grades])
    if options.score == "exact":
        return to_json({"utility": percentage, "unparsed": unparsed}), columns
    verdicts = judge.judge(rows, texts, judge.remote(options.service, Path(f"{options.out}.judge")))
    estimates, agreement = judge.summarise(verdicts, grades)
    figures = {**to_json({**estimates, "exact": percentage, "unparsed": unparsed}), **agreement}
    return figures, [
        {**column, "verdict": verdict} for column, verdict in zip(columns, verdicts, strict=True)
    ]


def by_likelihood(
    options: Options, model: Llama, tokenizer: Tokenizer, placed: Placed, asked: list[Messages]
) -> tuple[dict[str, object], list[dict]]:
    """(figures, columns for each row): the option likeliest by the mean over its tokens is the answer; by their sum for comparison."""
    columns = []
    for (place, row), messages in tqdm(list(zip(placed, asked, strict=True)), desc="options", leave=False):
        parts = option_logprobs(options, model, tokenizer, row, messages, place)
        sums = [part.sum().item() for part in parts]
        means = [part.mean().item() for part in parts]
        by_mean, by_sum = likeliest(means), likeliest(sums)
        columns.append(
            {
                "option_logprobs": [round(mean, 4) if math.isfinite(mean) else None for mean in means],
                "correct": by_mean == row["answer_index"],
                "correct_by_sum": by_sum == row["answer_index"],
                "decided": by_mean is not None,
            }
        )
    share = lambda name: mean_interval([100 * column[name] for column in columns])
    undecided = mean_interval([100 * (not column["decided"]) for column in columns])
    return to_json(
        {"utility": share("correct"), "utility_by_sum": share("correct_by_sum"), "undecided": undecided}
    ), columns


def option_logprobs(
    subject: Subject, model: Llama, tokenizer: Tokenizer, row: dict, messages: Messages, place: str
) -> list[Tensor]:
    """Guided log-probabilities of each option's tokens after `LEAD`, (tokens,) each. Raises ContextError naming `place`."""
    request = request_for(subject, tokenizer, [*messages, {"role": "assistant", "content": LEAD}])
    options = [tokenizer.encode(f" {option}") for option in row["options"]]
    for option in options:
        check_fits(model, request, option, place)
    return continuation_logprobs(model, [request] * len(options), options)


def likeliest(logprobs: list[float]) -> int | None:
    """The place of the highest; None where several are, as where guidance has made every option impossible."""
    best = max(logprobs)
    return logprobs.index(best) if best > -math.inf and logprobs.count(best) == 1 else None


def exact(text: str, row: dict) -> bool | None:
    """Whether a short answer is right; None where it names no option."""
    return correct(text, row) if named(text, row) else None


def exact_letter(text: str, row: dict) -> bool | None:
    """Whether a worked answer ends in the right letter; None where it gives none."""
    given = mmlu_pro.letter(text)
    return None if given is None else given == mmlu_pro.LETTERS[row["answer_index"]]


def correct(text: str, row: dict) -> bool:
    """The answer names the right option and none of the others, but for those that stand inside the right one."""
    right, found = row["options"][row["answer_index"]], named(text, row)
    return right in found and all(option == right or option.lower() in right.lower() for option in found)


def named(text: str, row: dict) -> list[str]:
    """The options that the answer names, as whole words in any case."""
    return [option for option in row["options"] if mentions(text, "OPTION", option)]


def score(rows: list[dict], texts: list[str]) -> Estimate:
    """Percentage of right short answers with its 95 % interval."""
    return mean_interval([100 * correct(text, row) for row, text in zip(rows, texts, strict=True)])


def _chat(text: str) -> Messages:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
