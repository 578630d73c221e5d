"""Questions from files and the hub, all protocols and the three scores; guidance on each of them."""

import json
import math
import sys
import time

import huggingface_hub
import pytest
import torch

from cfgsafe import subject
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.measure import grading, judge, mmlu_pro, utility
from cfgsafe.remote import Service
from cfgsafe.subject import NEGATIVE, POSITIVE, Answer

QUESTION = {
    "question_id": 70,
    "question": "What is hot?",
    "options": ["ice", "fire"],
    "answer_index": 1,
    "category": "nature",
}


def shot(number: int, category: str) -> dict:
    letter = "AB"[number % 2]
    return {
        "question_id": number,
        "question": f"Is {number} even?",
        "options": ["yes", "no"],
        "answer_index": number % 2,
        "category": category,
        "cot_content": f"A: Let's think step by step. {number} tells. The answer is ({letter}).",
    }


SHOTS = [shot(number, "nature") for number in range(6)] + [shot(number, "law") for number in range(10, 15)]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Two questions, and the examples for them."""
    write_jsonl(
        tmp_path / "q.jsonl",
        [QUESTION, {**QUESTION, "question_id": 71, "question": "What is cold?", "answer_index": 0}],
    )
    write_jsonl(tmp_path / "shots.jsonl", SHOTS)
    return {
        "questions": str(tmp_path / "q.jsonl"),
        "shots": str(tmp_path / "shots.jsonl"),
        "out": str(tmp_path / "out" / "a.jsonl"),
    }


# --- reading


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_parquet_and_jsonl_give_the_same_questions(tmp_path):
    rows = [{**QUESTION, "options": ["N/A", "ice", "fire", "N/A"], "answer_index": 2}, QUESTION]
    write_jsonl(tmp_path / "q.jsonl", rows)
    read = [mmlu_pro.read(parquet(tmp_path / "q.parquet", rows)), mmlu_pro.read(str(tmp_path / "q.jsonl"))]
    assert [row for _, row in read[0]] == [row for _, row in read[1]] == [QUESTION, QUESTION]
    assert [place.rsplit("/")[-1] for place, _ in read[0]] == ["q.parquet:1", "q.parquet:2"]


def test_the_hub_is_asked_for_mmlu_pros_file(tmp_path, monkeypatch):
    file, asked = parquet(tmp_path / "v.parquet", SHOTS), []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return file

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    read = mmlu_pro.read("mmlu-pro/validation")
    assert [row["question_id"] for _, row in read] == [row["question_id"] for row in SHOTS]
    mmlu_pro.read("mmlu-pro/test")
    assert asked == [
        ("TIGER-Lab/MMLU-Pro", "data/validation-00000-of-00001.parquet", "dataset"),
        ("TIGER-Lab/MMLU-Pro", "data/test-00000-of-00001.parquet", "dataset"),
    ]


def test_a_misspelt_set_names_those_there_are():
    words = "mmlu-pro/nonsense: no such set of questions; there are mmlu-pro/validation, mmlu-pro/test"
    with pytest.raises(InputError, match=words):
        mmlu_pro.read("mmlu-pro/nonsense")


def test_an_unreachable_hub_is_one_line(monkeypatch, tmp_path):
    def offline(*place, **more):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match="TIGER-Lab/MMLU-Pro/data/test.*: the hub cannot be reached"):
        mmlu_pro.read("mmlu-pro/test")


def test_parquet_without_pyarrow_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    words = r"x\.parquet: parquet needs pyarrow; pip install 'cfgsafe\[parquet\]'"
    with pytest.raises(InputError, match=words):
        mmlu_pro.read(str(tmp_path / "x.parquet"))


def test_a_broken_parquet_file_and_a_bad_row_are_one_line(tmp_path):
    (tmp_path / "x.parquet").write_text("PAR1 it is not")
    with pytest.raises(InputError, match="x.parquet: cannot be read as parquet"):
        mmlu_pro.read(str(tmp_path / "x.parquet"))
    with pytest.raises(InputError, match="w.parquet:1: needs a right option and a wrong one"):
        mmlu_pro.read(parquet(tmp_path / "w.parquet", [{**QUESTION, "options": ["N/A", "fire"]}]))
    with pytest.raises(InputError, match="missing.parquet: cannot be read as parquet"):
        mmlu_pro.read(str(tmp_path / "missing.parquet"))
    with pytest.raises(InputError, match="y.parquet:2: 'answer_index'"):
        mmlu_pro.read(parquet(tmp_path / "y.parquet", [QUESTION, {**QUESTION, "answer_index": 2}]))


# --- the short protocol


def test_a_short_prompt_numbers_its_options_one_a_line():
    """Joined by commas, "ice, or snow" would be two options."""
    row = {"question": "What is hot?", "options": ["ice,\n or snow ", "fire"], "answer_index": 1}
    words = "Provide a short answer to the question: What is hot?\nOptions:\n1. ice, or snow\n2. fire"
    assert utility.prompt(row) == words


# --- the 5-shot protocol


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("So the answer is (C).", "C"),
        ("The answer is D", "D"),
        ("the answer is (J)", "J"),
        ("The answer is (A). Or rather, the answer is (B).", "A"),  # the first that says so
        ("Answer: B", "B"),
        ("answer:\n  G is it", "G"),
        ("Answer: B. No, answer: C\nAnswer: D", "C"),  # the last one of the first line that has one
        ("Answer: B, but the answer is (E)", "E"),  # the earlier pattern, wherever it stands
        ("Final Answer: (F)", "F"),  # a bracket is not in the second pattern: the last lone letter
        ("A is too small, B is too large, so C", "C"),
        ("It must be H.\nDone.", "H"),
        ("the answer is (c)", None),  # lower case is no letter
        ("the answer is (K)", None),  # beyond J
        ("Because ICE and FIRE Differ", None),  # letters inside words
        ("vitamin B12", None),
        ("B_1", None),
        ("", None),
        ("none of them", None),
        ("I do not know", "I"),  # the pronoun: a known weakness of the chain
        ("The answer is (B).\n\nQuestion:\nWhat else?\nAnswer: the answer is (D)", "B"),
        # an example that the model has begun itself
        ("No idea\n\nQuestion:\nWhat else? the answer is (D)", None),
    ],
)
def test_the_letter_is_read_by_tiger_labs_chain(text, given):
    assert mmlu_pro.letter(text) == given


def test_the_letter_of_a_long_repetitive_answer_is_found_in_a_moment():
    """One pattern for the last lone letter looks through the rest of the answer after each of them."""
    started = time.monotonic()
    assert mmlu_pro.letter("A " * 10_000 + "B" + " well" * 10_000) == "B"
    assert time.monotonic() - started < 5


def test_a_5_shot_prompt_is_tiger_labs():
    examples = [SHOTS[0], {**SHOTS[1], "cot_content": "A: Let's think step by step. So."}]
    assert mmlu_pro.cot_prompt(QUESTION, examples) == (
        "The following are multiple choice questions (with answers) about nature. Think step by step and "
        'then finish your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n\n'
        "Question:\nIs 0 even?\nOptions:\nA. yes\nB. no\n"
        "Answer: Let's think step by step. 0 tells. The answer is (A).\n\n"
        "Question:\nIs 1 even?\nOptions:\nA. yes\nB. no\nAnswer: Let's think step by step. So.\n\n"
        "Question:\nWhat is hot?\nOptions:\nA. ice\nB. fire\nAnswer: Let's think step by step."
    )


def test_the_examples_are_the_first_five_of_the_questions_own_category(files):
    shots = mmlu_pro.read_shots(files["shots"])
    assert [row["question_id"] for row in shots["nature"]] == [0, 1, 2, 3, 4]
    (prompt,) = mmlu_pro.cot_prompts([("q:1", {**QUESTION, "category": "law"})], shots)
    assert prompt.count("Question:\n") == 6
    assert "Is 14 even?" in prompt and "Is 4 even?" not in prompt


def test_no_question_is_asked_5_shot_on_itself(files):
    for changes in ({}, {"question_id": 900}, {"question": "The same one, reworded?"}):
        placed = [(place, {**row, **changes}) for place, row in mmlu_pro.read(files["shots"])]
        words = "shots.jsonl:1: 'question_id' .* is among the --shots"
        with pytest.raises(InputError, match=words) as refusal:
            mmlu_pro.cot_prompts(placed, mmlu_pro.read_shots(files["shots"]))
        assert "\n" not in str(refusal.value)


def test_validation_asked_5_shot_is_refused_before_a_model_is_loaded(files):
    options = utility.Options(
        "nowhere", questions=files["shots"], shots=files["shots"], protocol="cot5", out=files["out"]
    )
    with pytest.raises(InputError, match="among the --shots"):
        utility.run(options)


@pytest.mark.parametrize(
    ("question", "shots", "words"),
    [
        ({"category": "music"}, SHOTS, "q:1: 'category' 'music' has 0 examples"),
        ({}, SHOTS[:4], "q:1: 'category' 'nature' has 4 examples"),
        ({"category": None}, SHOTS, "q:1: 'category' must be a string"),
        ({"category": "music", "question_id": [1]}, SHOTS, "q:1: 'category' 'music' has 0 examples"),
        ({"options": list("abcdefghijk")}, SHOTS, "q:1: 11 options"),
        ({}, [{**SHOTS[0], "cot_content": ""}], "s.jsonl:1: 'cot_content'"),
    ],
)
def test_what_cannot_be_asked_5_shot_names_the_row(tmp_path, question, shots, words):
    write_jsonl(tmp_path / "s.jsonl", shots)
    placed = [("q:1", {**QUESTION, **question})]
    with pytest.raises(InputError, match=words):
        mmlu_pro.cot_prompts(placed, mmlu_pro.read_shots(str(tmp_path / "s.jsonl")))


def test_a_worked_answer_is_right_by_its_letter_and_unparsed_ones_get_no_credit(
    files, checkpoint, monkeypatch, capsys
):
    said = [Answer("So the answer is (B).", "stop"), Answer("no letter at all", "length")]
    monkeypatch.setattr(utility, "answers", lambda *_, **__: said)
    options = utility.Options(checkpoint, questions=files["questions"], shots=files["shots"])
    options.protocol = "cot5"
    utility.run(options)
    result = json.loads(capsys.readouterr().out)
    assert (result["utility"], result["unparsed"], result["cut_off"]) == (50.0, 50.0, 50.0)
    assert grading.exact_letter("the answer is (A)", QUESTION) is False
    assert grading.exact_letter("none", QUESTION) is None


# --- the likelihood of the options


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("protocol", ["short", "cloze"])
def test_option_scores_by_hand(checkpoint, guidance, protocol):
    """The lead and the option continue the answer under both system prompts: eq. 6 of the paper.

    Cloze asks the bare question: the options stand nowhere.
    """
    who = utility.Options(checkpoint, guidance=guidance, protocol=protocol)
    model, tokenizer = subject.load(who)
    question = "Provide a short answer to the question: What is hot?"
    if protocol == "short":
        question = utility.prompt(QUESTION)
    asked = utility.conversations([("q:1", QUESTION)], who)
    (parts,) = utility.option_logprobs(who, model, tokenizer, [("q:1", QUESTION)], asked)
    assert len(parts) == 2
    for option, part in zip(QUESTION["options"], parts, strict=True):
        ids = tokenizer.encode(f" {option}")
        assert tokenizer.decode(ids) == f" {option}" and len(part) == len(ids)
        probabilities = []
        for added in [""] if guidance is None else [f" {POSITIVE}", f" {NEGATIVE}"]:
            said = {"system": utility.SYSTEM + added, "user": question, "assistant": "The answer is"}
            chat = [{"role": role, "content": text} for role, text in said.items()]
            prompt = tokenizer.encode_chat(chat)
            logits = model.head(model(torch.tensor([prompt + ids])))[0, len(prompt) - 1 : -1]
            probabilities.append(logits.softmax(-1))
        one, other = probabilities[0], probabilities[-1]
        guided = one if guidance is None else (other + guidance * (one - other)).clamp(min=0)
        expected = (guided / guided.sum(-1, keepdim=True)).log()[range(len(ids)), ids]
        assert torch.allclose(part, expected, atol=1e-3)


def scored_as(monkeypatch, *questions: list[list[float]]) -> None:
    """Each question's options get these log-probabilities of their tokens."""
    found = [[torch.tensor(part) for part in parts] for parts in questions]
    monkeypatch.setattr(utility, "option_logprobs", lambda *_: found)


def test_the_likeliest_option_by_mean_and_by_sum(files, checkpoint, monkeypatch, capsys):
    """The long option wins by its mean, not by its sum; the second question has only impossible options."""
    scored_as(monkeypatch, [[-3.0], [-2.0, -2.0]], [[-torch.inf], [-torch.inf]])
    options = utility.Options(checkpoint, questions=files["questions"], out=files["out"])
    options.score = "loglik"
    utility.run(options)
    result = json.loads(capsys.readouterr().out)
    assert (result["utility"], result["utility_by_sum"], result["undecided"]) == (50.0, 0.0, 50.0)
    assert (result["margin"], result["impossible"]) == (0.5, 40.0)  # of 1 and 0 nats; 2 of 5 tokens
    first, second = (json.loads(line) for line in open(files["out"]))
    assert first["option_logprobs"] == [-3.0, -2.0]
    assert first["correct"] and not first["correct_by_sum"] and first["margin"] == 1.0
    assert second["option_logprobs"] == [None, None]
    assert not second["correct"] and not second["decided"] and second["margin"] == 0.0


def test_cloze_is_scored_by_likelihood_without_being_told(files, checkpoint, monkeypatch, capsys):
    """The figures of both ways of comparing, whatever --score is left to."""
    scored_as(monkeypatch, [[-3.0], [-2.0, -2.0]], [[-1.0], [-2.0]])
    for score in (None, "loglik"):
        utility.run(utility.Options(checkpoint, questions=files["questions"], protocol="cloze", score=score))
        result = json.loads(capsys.readouterr().out)
        assert (result["protocol"], result["score"]) == ("cloze", "loglik")
        assert (result["utility"], result["utility_by_sum"]) == (100.0, 50.0)


def test_margins_by_hand(monkeypatch):
    """The mean of the right option less that of the best wrong one; no token is below 1e-9."""
    least = math.log(1e-9)
    row = {**QUESTION, "options": ["ice", "fire", "snow"]}
    scored_as(
        monkeypatch,
        [[-4.0], [-1.0, -2.0], [-3.0, -1.0]],  # -1.5 less -2, the better one
        [[-0.5], [-1.0], [-9.0]],
        [[-1.0], [-torch.inf, -1.0], [-2.0]],
        [[-torch.inf], [-1.0], [-50.0]],
        [[-1.0], [-torch.inf], [-2.0]],
    )
    found = utility.margins(subject.Subject("m"), None, None, [row] * 5)
    want = [0.5, -0.5, (least - 1) / 2 + 1, -1 - least, least + 1]
    assert found == pytest.approx(want, abs=1e-5)


def test_options_of_several_questions_are_scored_together(checkpoint, monkeypatch):
    batches = []

    def record(model, requests, continuations, *, batch, desc):
        batches.append([tuple(ids) for ids in continuations])
        assert (batch, desc) == (3, "options")
        return [torch.tensor([-float(ids[-1])]) for ids in continuations]

    monkeypatch.setattr(utility, "continuation_logprobs", record)
    who = subject.Subject(checkpoint, batch=3)
    model, tokenizer = subject.load(who)
    rows = [QUESTION, {**QUESTION, "options": ["  sun\nlight ", "fire", "ice"]}]
    placed = [("q:1", rows[0]), ("q:2", rows[1])]
    found = utility.option_logprobs(who, model, tokenizer, placed, [utility.conversation(r) for r in rows])
    words = [" ice", " fire", " sun light", " fire", " ice"]
    assert batches == [[tuple(tokenizer.encode(word)) for word in words]]
    ends = [[-part.item() for part in parts] for parts in found]
    assert ends == [
        [tokenizer.encode(w)[-1] for w in words[:2]],
        [tokenizer.encode(w)[-1] for w in words[2:]],
    ]


def test_equal_options_are_undecided():
    assert utility.likeliest([-1.0, -2.0]) == 0 and utility.likeliest([-1.0, -1.0]) is None
    assert utility.likeliest([-torch.inf] * 2) is None


# --- the judge


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Correct", "Correct"),
        (" **incorrect**.\n", "Incorrect"),
        ("Can’t tell", "Can't tell"),
        ('"CAN\'T TELL"', "Can't tell"),
        ("Not correct", None),
        ("Correct, because fire is hot", None),
        ("Correct Incorrect", None),
        ("", None),
    ],
)
def test_only_one_of_three_words_is_a_verdict(reply, said):
    assert judge.verdict(reply) == said


def test_the_judge_gets_question_right_option_and_answer():
    seen = []

    def ask(chats):
        seen.extend(chats)
        return ["Correct"]

    assert judge.judge([QUESTION], ["It is fire."], ask) == ["Correct"]
    text = seen[0][-1]["content"]
    assert "Question: What is hot?\nOptions:\n1. ice\n2. fire\nRight option: fire\n" in text
    assert "<answer>\nIt is fire.\n</answer>" in text


def test_agreement_with_the_exact_score_by_hand():
    """Both decide ten: 4 yes-yes, 3 no-no, 2 yes-no, 1 no-yes; p = 0.7, c = 0.6 * 0.5 + 0.4 * 0.5 = 0.5."""
    verdicts = ["Correct"] * 4 + ["Incorrect"] * 3 + ["Correct"] * 2 + ["Incorrect"]
    verdicts += ["Can't tell", "Can't tell", None, "Correct"]
    exact = [True] * 4 + [False] * 3 + [False] * 2 + [True] + [True, None, False, None]
    figures, agreement = judge.summarise(verdicts, exact)
    assert agreement == {"both_decide": 10, "agreement": 70.0, "kappa": 0.4}
    shares = {name: round(estimate.value, 2) for name, estimate in figures.items()}
    assert shares == {"utility": 50.0, "cant_tell": 14.29, "unparsable": 7.14}  # 7, 2 and 1 of 14


def test_kappa_is_undefined_where_chance_always_agrees():
    assert judge.agreement([(True, True)] * 3) == {"both_decide": 3, "agreement": 100.0, "kappa": None}
    assert judge.agreement([]) == {"both_decide": 0, "agreement": None, "kappa": None}


@pytest.fixture
def service(monkeypatch) -> list:
    """What the judge was asked; a stand-in for the remote client, which finds everything correct."""
    asked = []

    def ask(service, questions, cache, what):
        asked.append((service, questions, cache))
        return ["Correct"] * len(questions)

    monkeypatch.setattr(judge, "ask", ask)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    return asked


def test_a_judged_run_reports_all_figures(files, checkpoint, service, capsys, monkeypatch):
    monkeypatch.setattr(utility, "answers", lambda *_, **__: [Answer("fire", "length")] * 2)
    options = utility.Options(checkpoint, score="judge", questions=files["questions"], out=files["out"])
    options.service, options.limit = Service("gpt-4o-mini"), 2
    utility.run(options)
    result = json.loads(capsys.readouterr().out)
    assert (result["utility"], result["exact"]) == (100.0, 50.0)
    assert (result["cant_tell"], result["unparsable"], result["cut_off"]) == (0.0, 0.0, 100.0)
    assert (result["both_decide"], result["agreement"], result["kappa"]) == (2, 50.0, 0.0)
    ((asked, questions, cache),) = service
    assert asked.remote_model == "gpt-4o-mini" and str(cache) == files["out"] + ".judge"
    assert len(questions) == 2 and all(q.temperature == 0 for q in questions)
    assert [json.loads(line)["verdict"] for line in open(files["out"])] == ["Correct", "Correct"]


# --- options, resuming, guidance


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "loglik", "protocol": "cot5"}, "--score loglik"),
        ({"score": "exact", "protocol": "cloze"}, "--score exact: --protocol cloze shows no options"),
        ({"score": "judge", "protocol": "cloze"}, "--score judge: --protocol cloze shows no options"),
        ({"score": "loglik", "protocol": "open"}, "--score loglik: .* --protocol cloze"),
        ({"score": "judge", "out": "x"}, "--remote-model"),
        ({"score": "judge", "service": Service("m")}, "--out FILE"),
        ({"limit": 0}, "--limit 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused_first(options, words):
    with pytest.raises(InputError, match=words):
        utility.run(utility.Options("nowhere", **options))


def test_answers_are_kept_and_scored_again_without_the_model(files, checkpoint, monkeypatch, capsys):
    options = utility.Options(checkpoint, questions=files["questions"], out=files["out"], max_new_tokens=3)
    utility.run(options)
    first, written = capsys.readouterr().out, open(files["out"]).read()

    def generate(model, requests, **_):
        assert not requests, "asked again"
        return []

    monkeypatch.setattr(subject, "generate", generate)
    utility.run(options)
    assert capsys.readouterr().out == first and open(files["out"]).read() == written


@pytest.mark.parametrize(
    ("protocol", "score"),
    [
        ("short", "exact"),
        ("short", "loglik"),
        ("short", "judge"),
        ("cot5", "exact"),
        ("cot5", "judge"),
        ("cloze", "loglik"),
        ("open", "exact"),
        ("open", "judge"),
    ],
)
def test_every_protocol_and_score_is_guided(files, checkpoint, service, monkeypatch, capsys, protocol, score):
    seen = []

    def spy(real):
        def recorded(model, requests, *rest, **more):
            seen.extend(requests)
            return real(model, requests, *rest, **more)

        return recorded

    monkeypatch.setattr(subject, "generate", spy(subject.generate))
    monkeypatch.setattr(utility, "continuation_logprobs", spy(utility.continuation_logprobs))
    who = utility.Options(checkpoint, guidance=3.0, space="log", alpha=0.1, **files)
    who.protocol, who.score, who.service, who.max_new_tokens = protocol, score, Service("m"), 2
    utility.run(who)
    tokenizer = subject.load_tokenizer(checkpoint)
    assert len(seen) == (4 if score == "loglik" else 2)  # requests: one an option, or one a question
    assert all(r.guided and (r.guidance, r.space, r.alpha) == (3.0, "log", 0.1) for r in seen)
    assert all(POSITIVE in tokenizer.decode(r.prompt) for r in seen)
    assert all(NEGATIVE in tokenizer.decode(r.negative) for r in seen)
    assert json.loads(capsys.readouterr().out)["guidance"] == 3.0


def test_guidance_changes_the_option_scores(files, checkpoint):
    scores = []
    for guidance in (1.0, 3.0):
        options = utility.Options(
            checkpoint, guidance=guidance, score="loglik", questions=files["questions"], out=files["out"]
        )
        utility.run(options)
        scores.append([json.loads(line)["option_logprobs"] for line in open(files["out"])])
    assert scores[0] != scores[1]
