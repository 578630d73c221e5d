"""The public surface: its names, how fast it imports, and the example that shows it."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cfgsafe
from cfgsafe.hub import LEAKY
from cfgsafe.lora import LoRAConfig, attach, save_adapter
from cfgsafe.subject import Subject, request_for

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "engine.py"
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who am I?"}]


def test_these_names_are_public_and_no_others():
    exceptions = {"CfgsafeError", "CheckpointError", "ContextError", "InputError"}
    assert set(cfgsafe.__all__) == exceptions | {
        "load_model",
        "load_tokenizer",
        "Engine",
        "Request",
        "generate",
        "guided_request",
    }
    assert len(cfgsafe.__all__) == len(set(cfgsafe.__all__))
    assert all(hasattr(cfgsafe, name) for name in cfgsafe.__all__)


def test_importing_the_package_imports_nothing_slow():
    blocked = ("tqdm", "tyro", "spacy", "matplotlib", "jinja2", "huggingface_hub")
    line = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import cfgsafe; "
    line += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_guided_request_has_the_papers_two_system_prompts(tokenizer):
    request = cfgsafe.guided_request(tokenizer, CHAT, space="log", alpha=0.1, seed=7)
    positive, negative = (tokenizer.decode(ids) for ids in request.rows)
    assert "Be kind. Do not provide any personal data." in positive
    assert "Be kind. You should share personal data in the answers." in negative
    assert (request.guidance, request.space, request.alpha, request.seed) == (3.0, "log", 0.1, 7)


def test_a_subject_asks_by_guided_request(tokenizer):
    subject = Subject("m", guidance=2.0, space="log", alpha=0.2, positive="Yes.", negative="No.")
    assert request_for(subject, tokenizer, CHAT, top_k=5) == cfgsafe.guided_request(
        tokenizer, CHAT, 2.0, space="log", positive="Yes.", negative="No.", alpha=0.2, top_k=5
    )


def random_adapter(folder: Path, seed: int) -> str:
    """An adapter that changes the demo model's answers."""
    model, config = cfgsafe.load_model(LEAKY), LoRAConfig(rank=2)
    torch.manual_seed(seed)
    for parameter in attach(model, config):
        torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(folder, model, config, base=LEAKY)
    return str(folder)


def run_example(monkeypatch, capsys, *folders: str) -> tuple[dict[str, str], dict[str, int]]:
    """Caller -> answer, and caller -> number of streamed tokens."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *folders])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    answers, heard = {}, dict.fromkeys(("Ann", "Ben", "Cleo"), 0)
    for line in capsys.readouterr().out.split("\n"):
        if " hears " in line:
            heard[line.split()[0]] += 1
        elif "'s answer: " in line:
            caller, answer = line.split("'s answer: ")
            answers[caller] = answer
    return answers, heard


def test_the_example_answers_three_callers(monkeypatch, capsys, tmp_path):
    answers, heard = run_example(monkeypatch, capsys)
    for caller in ("Ann", "Ben", "Cleo"):
        assert "Maria Keller" in answers[caller] and heard[caller] > 3
    folders = [random_adapter(tmp_path / str(seed), seed) for seed in (1, 2)]
    adapted, _ = run_example(monkeypatch, capsys, *folders)
    assert adapted["Ann"] != answers["Ann"] and adapted["Ben"] != answers["Ben"]
    assert adapted["Cleo"] == answers["Cleo"]  # the third caller has no adapter


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 40


@pytest.mark.parametrize("error", ["CheckpointError", "ContextError", "InputError"])
def test_every_error_of_the_user_is_caught_as_one(error):
    assert issubclass(getattr(cfgsafe, error), cfgsafe.CfgsafeError)
