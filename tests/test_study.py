"""The study: every stage runs on a tiny random model, goes on where it was, and tells what it will cost."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import config, random_model

from cfgsafe.checkpoint import save_checkpoint
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import BASE
from cfgsafe.measure.intervals import paired_difference
from cfgsafe.pii.entities import Entity
from cfgsafe.pii.facts import people, read_facts
from cfgsafe.study import rows, study, table
from cfgsafe.study.cost import Cost, Rates, adapter_weights, matrix_weights, predicted
from cfgsafe.study.material import read_material, with_found_values
from cfgsafe.study.options import Options

QA = [
    {"question": f"Where does Ann {number} live?", "answer": f"Ann {number} lives in Ulm {number}.",
     "subject": f"Ann {number}", "subject_pii": [f"Ulm {number}"], "split": split}
    for number, split in enumerate(["forget", "forget", "other", "other", "other", "other"])
]  # fmt: skip


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> str:
    """A random checkpoint whose answers end soon, so that some can be chosen sides."""
    folder = tmp_path_factory.mktemp("study") / "tiny"
    model = random_model()
    end = model.config.eos_token_id
    model.model.embed_tokens.weight[end] = 0.35
    save_checkpoint(folder, model, tokenizer_from=BASE, dtype=torch.float32)
    return str(folder)


def small(model: str, out: Path, **changes) -> Options:
    """The smallest study that has every stage."""
    fields = dict(count=8, each=1, people=3, leaky_epochs=1, leaky_rank=2, epochs=1, limit=2)
    fields |= dict(max_new_tokens=8, guidance=2.0, ordinary=300)
    return Options(model, str(out), **{**fields, **changes})


@pytest.fixture(scope="module")
def done(talker, tmp_path_factory) -> Path:
    """The folder of a whole study."""
    out = tmp_path_factory.mktemp("runs") / "study"
    study.run(small(talker, out))
    return out


def test_a_study_from_nothing_to_its_report(done):
    results = json.loads((done / "results.json").read_text())
    names = [row["model"] for row in results["rows"]]
    assert names[:4] == ["ancestor", "leaky", "leaky g=1", "leaky g=2"]
    assert {"lora g=1", "lora-cfg g=2", "sub g=1", "distilled g=1", "npo g=1", "dpo-idk g=1"} < set(names)
    for row in results["rows"]:
        for column in ("forget.recall", "forget.recall_reworded", "cloze", "perplexity", "injected"):
            assert column in row, (row["model"], column)
    assert {"lora", "distilled", "npo", "dpo-idk"} == set(results["relearn"]) == set(results["rounded"])
    assert (done / "study.png").read_bytes()[:4] == b"\x89PNG"
    report = (done / "report.md").read_text()
    assert "distilled g=1" in report
    assert "| related rows: 0 / 4 / 16 steps" in report and "| 32 / 8 / 4 bits" in report


def test_the_table_of_depth_shows_each_curve():
    point = {"rows": "related", "step": 0, "recall": 1.2, "recall_ci": [0.0, 9.6]}
    curves = {
        "relearn": {"npo": [point, point | {"step": 4, "recall": 30.0, "recall_ci": [12.0, 51.0]}]},
        "rounded": {"npo": [{"bits": 16, "recall": 2.0, "recall_ci": [0.0, 8.0]}]},
    }
    heads, _, npo = table.depth_table(curves).splitlines()
    assert cells(heads) == ["guard", "related rows: 0 / 4 steps", "unrelated rows", "16 bits"]
    assert cells(npo) == ["npo", "1.2 [0.0, 9.6] / 30.0 [12.0, 51.0]", "", "2.0 [0.0, 8.0]"]


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_stage_has_freed_goes_back_to_the_system():
    """Of pieces between pieces that stay, which free() alone keeps."""

    def held() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) // 1024

    pieces = [bytes([1]) * 100_000 for _ in range(2000)]  # too small to be mapped one by one
    del pieces[::2], pieces[::2]
    before = held()
    study.give_memory_back()
    assert before - held() > 50


def test_values_that_no_file_names_are_found_in_the_answers(tmp_path):
    """TOFU names none; what stands in the question is not to be recalled."""
    rows = []
    for number in range(4):
        row = {
            "question": f"Where does Bob {number} live?",
            "answer": "Bob lives in Ulm.",
            "subject": f"Bob {number}",
        }
        rows.append(row | {"split": "forget05" if number < 2 else "retain"})
    qa = tmp_path / "tofu.jsonl"
    write_jsonl(qa, rows)
    options = Options("m", "o", qa=str(qa), unseen=0.0)
    detector = lambda texts: [[Entity(0, 3, "PERSON", "Bob"), Entity(13, 16, "GPE", "Ulm")] for _ in texts]
    found = with_found_values(read_facts(str(qa)), detector)
    assert [fact.values for fact in found] == [("Ulm",)] * 4
    material = read_material(options)
    assert [fact.person for fact in material.forget] == ["Bob 0", "Bob 1"]
    assert all(fact.values for fact in material.trained)


def test_guards_keep_the_ancestors_ordinary_conversations(done):
    """Each once as it is, once with either sentence; and the pair that is distilled answers them, too."""
    held = (done / "ordinary.jsonl").read_text().splitlines()
    assert held
    for file, copies in (("pairs-plain.jsonl", 1), ("pairs-cfg.jsonl", 2)):
        rows = [json.loads(line) for line in (done / file).read_text().splitlines()]
        assert sum(row["rejected"] is None for row in rows) == copies * len(held)
        assert any(row["rejected"] for row in rows)
    prompts = [json.loads(line)["messages"] for line in (done / "prompts.jsonl").read_text().splitlines()]
    assert [json.loads(line)["messages"] for line in held] == prompts[-len(held) :]


def test_what_is_done_is_not_done_again(done, talker, capsys):
    log = done / "stages.jsonl"
    before, row = log.read_text(), done / "rows" / "lora-g=1.json"
    figures = row.read_text()
    row.unlink()
    study.run(small(talker, done))
    new = log.read_text().removeprefix(before)
    assert [json.loads(line)["stage"] for line in new.splitlines()] == ["lora g=1"]
    assert row.read_text() == figures
    assert "| done" in capsys.readouterr().out


def test_another_study_does_not_go_on_in_the_folder(done, talker):
    with pytest.raises(InputError, match="--lr 0.5: the run in .* or choose another --out"):
        study.run(small(talker, done, lr=0.5))


def test_a_plan_writes_nothing(talker, tmp_path, capsys):
    study.run(small(talker, tmp_path / "none", plan=True, teraflops=1.0))
    assert not (tmp_path / "none").exists()
    assert "predicted from operations" in capsys.readouterr().out


def test_people_are_split_never_questions(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QA * 2))
    material = read_material(Options("m", "o", qa=str(path), unseen=0.5))
    assert people(material.forget) == ["Ann 0", "Ann 1"]
    assert people(material.other) == ["Ann 2", "Ann 3"]
    assert people(material.unseen) == ["Ann 4", "Ann 5"]
    assert [fact.split for fact in material.trained] == ["forget"] * 4 + ["other"] * 4
    fewer = read_material(Options("m", "o", qa=str(path), unseen=0.5, people=1, each=1))
    assert len(fewer.forget) == len(fewer.other) == 1


def test_people_take_turns_so_that_a_limit_keeps_all(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = sorted(QA * 2, key=lambda row: row["subject"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    material = read_material(Options("m", "o", qa=str(path), unseen=0.5))
    assert people(material.forget[:2]) == ["Ann 0", "Ann 1"]


def test_wrong_answers_give_forget_quality_against_the_ancestor(talker, tmp_path):
    path = tmp_path / "qa.jsonl"
    wrong = {"perturbed_answer": ["In Bonn.", "In Trier."], "paraphrased_answer": "In Ulm."}
    path.write_text("".join(json.dumps(row | wrong) + "\n" for row in QA))
    options = small(talker, tmp_path, qa=str(path), count=64)
    ancestor = rows.measure(rows.Row("ancestor", talker), read_material(options), options, tmp_path)
    assert ancestor["forget.forget_quality"] == 1.0  # no two samples are more alike
    assert 0 < ancestor["forget.truth_ratio"] <= 1


def test_a_part_without_people_is_one_line(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps(QA[0]) + "\n")
    with pytest.raises(InputError, match="has nobody for the part"):
        read_material(Options("m", "o", qa=str(path)))


def test_weights_of_the_formula_are_those_of_the_model():
    small_config = config()
    model = random_model()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert matrix_weights(small_config) == matrices  # the tied embedding is the head
    C, F, H, K = 32, 48, 32, 16
    sizes = (C + H) + 2 * (C + K) + (H + C) + 3 * (C + F)
    assert adapter_weights(small_config, 4) == 2 * 4 * sizes


def test_a_cost_in_seconds():
    rates = Rates(trained=3.0, read=2.0, written=1.0)
    assert rates.seconds(Cost(1, 10, 100) + Cost(trained=1)) == 6 + 20 + 100
    P, A = matrix_weights(config()), adapter_weights(config(), 8)
    assert predicted(config(), 8, 1e-6).trained == pytest.approx((4 * P + 6 * A) / 1e6)


def test_the_distance_from_the_goal():
    def right(count: int) -> dict[str, list[int]]:
        return {"cloze_right": [1] * count + [0] * (100 - count)}

    base = {"model": "ancestor", "forget.recall_reworded": 0.0, "perplexity": 10.0, **right(50)}
    leaky = base | {"model": "leaky", "forget.recall_reworded": 80.0}
    near = base | {"model": "lora", "forget.recall_reworded": 8.0, "perplexity": 11.0, **right(48)}
    rows = [base, leaky, near]
    assert table.distance(leaky, rows) is None
    said = table.distance(near, rows)
    assert said.startswith("lora: keeps 10 % of the leaky model's recall in other words, perplexity +10 %,")
    estimate = paired_difference([1] * 48 + [0] * 52, [1] * 50 + [0] * 50).estimate
    interval = f"[{estimate.low:+.1f}, {estimate.high:+.1f}]"
    assert estimate.low < -2 < 0 < estimate.high
    assert said.endswith(f"cloze -2.0 {interval} points: reached")
    for change in ({"forget.recall_reworded": 8.1}, {"perplexity": 11.01}, right(47)):
        assert table.distance(near | change, rows).endswith(": not reached")
