"""Guidance distilled into an adapter: the loss and its gradient, the teacher, resuming, bad input."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file

from cfgsafe import load_model
from cfgsafe.blue import distil, loop, merge, resume
from cfgsafe.blue.distil import STUDENT, Example, Options
from cfgsafe.checkpoint import save_checkpoint
from cfgsafe.decode import generate
from cfgsafe.distillation import COPY_BYTES, divergence, head_divergence
from cfgsafe.errors import InputError
from cfgsafe.files import Answer, write_jsonl
from cfgsafe.hub import BASE
from cfgsafe.lora import DEFAULT, LoRAConfig, adapter_parameters, attach, save_adapter, set_adapters
from cfgsafe.measure.scoring import continuation_logprobs
from cfgsafe.pii.facts import SYSTEM
from cfgsafe.subject import POSITIVE, Subject, request_for

LINES = ("kl", "grad_norm", "lr", "step", "epoch", "tokens")  # what does not depend on the machine


# --- the loss


def test_the_divergence_by_hand():
    """Of (1/2, 1/2, 0) from (1/4, 1/2, 1/4): 1/2 log 2. A word that the teacher never says counts nothing."""
    log_p = torch.tensor([[math.log(0.5), math.log(0.5), -torch.inf]])
    log_q = torch.tensor([[math.log(0.25), math.log(0.5), math.log(0.25)]])
    assert divergence(log_p, log_q).item() == pytest.approx(0.5 * math.log(2))
    assert divergence(log_q, log_q).item() == 0


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("adapted", [False, True])
def test_chunks_equal_a_dense_computation(rows, dtype, tolerance, adapted):
    """Value and gradient, with teachers that exclude words; also where the head carries an adapter."""
    model = random_model(tie_word_embeddings=not adapted)
    if adapted:
        for parameter in attach(model, LoRAConfig(rank=2, targets=("lm_head",)), STUDENT):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 2048, generator=generator, dtype=dtype)
    log_p = logits.masked_fill(logits < 0, -torch.inf).log_softmax(1)
    weights = torch.rand(7, generator=generator, dtype=dtype)
    first = torch.randn(7, 32, generator=generator, dtype=dtype)

    def dense(h: torch.Tensor) -> torch.Tensor:
        kept = log_p.exp()
        return (kept * (log_p.clamp(min=-1e9) - model.head(h).log_softmax(1))).sum(1)

    def chunked(h: torch.Tensor) -> torch.Tensor:
        return head_divergence(model, STUDENT, h, log_p.__getitem__, rows * COPY_BYTES * 2048)

    results = []
    for score in (dense, chunked):
        hidden = first.clone().requires_grad_()
        found = score(hidden)
        (found * weights).sum().backward()
        results.append((found, hidden.grad))
    (expected, wanted), (found, gradient) = results
    assert torch.allclose(found, expected, atol=10 * tolerance, rtol=tolerance)
    assert torch.allclose(gradient, wanted, atol=10 * tolerance, rtol=tolerance)


# --- teacher and student


def spread(model, adapter: str, std: float = 0.1, **changes) -> LoRAConfig:
    """Attach an adapter of random weights."""
    config = LoRAConfig(rank=4, alpha=8, **changes)
    for parameter in attach(model, config, adapter):
        torch.nn.init.normal_(parameter, std=std)
    return config


def examples_of(tokenizer, subject: Subject) -> list[Example]:
    found = []
    for text, answer in (("Who am I?", " You are Ann Lee of Rome."), ("Say it again.", " No.")):
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
        pair = request_for(subject, tokenizer, messages)
        found.append(Example(pair, tokenizer.encode_chat(messages), tokenizer.encode(answer), text))
    return found


@pytest.mark.parametrize(
    "guided",
    [
        {"guidance": 3.0},
        {"guidance": 2.0, "space": "log"},
        {"guidance": 2.0, "alpha": 0.1},
        {"guidance": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_adapter", [True, False])
def test_the_teacher_is_the_distribution_that_is_measured(
    model, tokenizer, monkeypatch, guided, with_adapter
):
    """Its probability of each answer is the one that eval.py scores, with the pair's adapter alone."""
    if with_adapter:
        spread(model, DEFAULT)
    examples = examples_of(tokenizer, Subject("m", **guided))
    pairs, given = [example.pair for example in examples], [example.answer for example in examples]
    expected = torch.cat(continuation_logprobs(model, pairs, given))
    spread(model, STUDENT, std=0.5)
    taught: list[torch.Tensor] = []

    def look(model, adapter, hidden, teacher):
        taught.append(teacher(slice(None)))
        return hidden.sum(1)

    monkeypatch.setattr(distil, "head_divergence", look)
    distil.batch_divergence(model, examples)
    targets = torch.tensor([token for answer in given for token in answer])
    assert torch.allclose(taught[0].gather(1, targets[:, None])[:, 0], expected, atol=1e-4)


@pytest.mark.parametrize("recompute", [0, 2])
def test_the_student_is_its_own_adapter_under_its_own_prompt(model, tokenizer, recompute):
    """Against a forward of each row alone; and only the student gets gradients."""
    spread(model, DEFAULT)
    spread(model, STUDENT)
    model.recomputed = recompute
    examples = examples_of(tokenizer, Subject("m", guidance=1.0))
    found = distil.batch_divergence(model, examples)
    expected = []
    for example in examples:
        sides = []
        for adapter, prompt in ((DEFAULT, example.pair.prompt), (STUDENT, example.student)):
            set_adapters(model, [adapter])
            row = model(torch.tensor([prompt + example.answer]))[0, len(prompt) - 1 : -1]
            sides.append(model.head(row).log_softmax(1))
        expected.append((sides[0].exp() * (sides[0] - sides[1])).sum(1))
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)
    set_adapters(model, [STUDENT])
    wanted = torch.autograd.grad(torch.cat(expected).sum(), list(adapter_parameters(model, STUDENT).values()))
    distil.batch_divergence(model, examples).sum().backward()
    for parameter, gradient in zip(adapter_parameters(model, STUDENT).values(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-3, rtol=1e-3)
    assert all(parameter.grad is None for parameter in adapter_parameters(model).values())


# --- the stage


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A tiny checkpoint, an adapter for it, and prompts, in one folder."""
    folder = tmp_path_factory.mktemp("pair")
    model = random_model()
    save_checkpoint(folder / "m", model, tokenizer_from=BASE, dtype=torch.float32)
    config = spread(model, DEFAULT, std=0.05, targets=("q_proj", "down_proj"))
    save_adapter(folder / "run" / "a", model, config, base="m")
    rows: list[dict] = [{"question": f"Who is number {n}?"} for n in range(3)]
    rows.append(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Left out"}]}
    )
    write_jsonl(folder / "p.jsonl", rows)
    return folder


def settings(pair: Path, out: Path, **changes) -> Options:
    given = {
        "adapter": str(pair / "run" / "a"),
        "max_new_tokens": 4,
        "lr": 1e-2,
        "batch_size": 2,
        "epochs": 3,
    }
    return Options(str(pair / "m"), prompts=str(pair / "p.jsonl"), out=str(out), **{**given, **changes})


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in LINES} for line in lines]


def weights(out: Path, epoch: int = 3) -> dict[str, torch.Tensor]:
    return load_file(out / f"epoch-{epoch}" / "adapter_model.safetensors")


@pytest.mark.parametrize("changes", [{"student": "none"}, {"adapter": None}], ids=str)
def test_a_student_comes_close_to_its_pair(tmp_path, pair, capsys, changes):
    out = tmp_path / "o"
    distil.run(settings(pair, out, epochs=12, temperature=0.0, **changes))
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 25))
    first, last = (sum(line["kl"] for line in part) for part in (lines[:2], lines[-2:]))
    assert last < first / 2
    result = json.loads(capsys.readouterr().out)
    assert (result["prompts"], result["answers"], result["kl"]) == (4, 4, lines[-1]["kl"])
    load_model(pair / "m", adapter=out / "epoch-12")
    config = json.loads((out / "config.json").read_text())
    size = 16 if changes.get("adapter", "") is None else 4
    assert (config["guidance"], config["space"], config["rank"]) == (3.0, "prob", size)


def test_the_answers_are_the_pairs_own(tmp_path, pair, monkeypatch):
    """Of the prompts as they are asked: each sample its own seed, an end token where the answer ended."""
    seen: list[Example] = []

    def train(model, examples, options, out):
        seen.extend(examples)

    monkeypatch.setattr(distil, "train", train)
    distil.run(settings(pair, tmp_path / "o", samples=2, student="none"))
    kept = [json.loads(line) for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()]
    assert len(seen) == 8 and len({row["answer"] for row in kept}) > 4
    model = load_model(pair / "m", adapter=pair / "run" / "a")
    tokenizer = distil.load(Subject(str(pair / "m")))[1]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who is number 1?"}]
    assert seen[2].student == seen[3].student == tokenizer.encode_chat(messages)
    asked = request_for(Subject("m", guidance=3.0), tokenizer, messages)
    assert seen[2].pair == asked and POSITIVE in tokenizer.decode(asked.prompt)
    request = replace(asked, temperature=1.0, seed=3, max_new_tokens=4)
    text = tokenizer.decode(generate(model, [request])[0].tokens)
    assert tokenizer.decode(seen[3].answer).removesuffix(tokenizer.end_of_turn) == text


def test_a_killed_run_goes_on_to_the_identical_result(tmp_path, pair, monkeypatch):
    """Killed among the answers, then at a step after a saved state."""
    whole, out = tmp_path / "whole", tmp_path / "o"
    distil.run(settings(pair, whole))

    def dies(*_):
        raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(distil, "train", dies)
        distil.run(settings(pair, out))
    real = loop.take_step

    def dies_at_4(run, step, lr, what):
        return dies() if what == "step 4" else real(run, step, lr, what)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(loop, "take_step", dies_at_4)
        distil.run(settings(pair, out, resume=True, save_every=3))
    assert [path.name for path in resume.states(out)] == ["state-000003"]
    with pytest.raises(InputError, match="--guidance 2.0: the run in .* began with 3.0"):
        distil.run(settings(pair, out, resume=True, guidance=2.0))
    distil.run(settings(pair, out, resume=True))
    assert metrics(out) == metrics(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(out)[name], weight), name
    assert (out / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_merging_says_which_prompt_a_distilled_adapter_needs(tmp_path, pair, capsys):
    for student, sentence in (("positive", "Be silent."), ("none", None)):
        out = tmp_path / student
        distil.run(settings(pair, out, student=student, epochs=1, positive="Be silent."))
        capsys.readouterr()
        merge.run(merge.Options(str(pair / "m"), str(out / "epoch-1"), str(tmp_path / f"merged-{student}")))
        said = capsys.readouterr().err
        assert (f'only with "{sentence}" in the system prompt' in said) if sentence else "WARNING" not in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "x"}', ":2: needs 'messages' or 'question'"),
        ('{"question": " "}', ":2: 'question' must be a non-empty string"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', r":2: messages\[0\].role must be"),
        ('{"messages": [{"role": "system", "content": "x"}]}', ":2: 'messages' must end with the user"),
        ("[1]", ":2: a JSON list, not an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "p.jsonl").write_text('{"question": "Who?"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"p.jsonl{words}"):
        distil.read_prompts(str(tmp_path / "p.jsonl"))


def test_a_model_that_gives_no_answers_is_one_line(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(distil, "answers", lambda *_: [Answer("", "failed")] * 4)
    with pytest.raises(InputError, match="p.jsonl: the pair gave no answer to any of them"):
        distil.run(settings(pair, tmp_path / "o"))


def test_torchrun_is_refused(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(distil, "world_size", lambda: 2)
    with pytest.raises(InputError, match="one process"):
        distil.run(settings(pair, tmp_path / "o"))
