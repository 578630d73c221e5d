"""The benchmarks run, their variants compute the same, and what they report is what they measured."""

import csv
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import tyro

from cfgsafe.bench import decode, goals, gpu, orpo_step
from cfgsafe.bench.__main__ import BENCHES, main
from cfgsafe.bench.orpo import OURS, Options, make_inputs
from cfgsafe.bench.shapes import DECODE_SHAPES, base_parameters, random_model
from cfgsafe.kernels import bench as kernel_bench
from cfgsafe.kernels import measure, reference, table
from cfgsafe.kernels.bench import METHODS
from cfgsafe.kernels.table import spread

READ = 10.0  # GB/s: what the tests say that this machine reads


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run a benchmark in this process: the object of its last line."""

    for module in (kernel_bench, decode):
        monkeypatch.setattr(module, "read_gb_per_second", lambda device: READ)

    def run(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.slow
def test_a_training_step_is_measured_in_all_variants(tmp_path, bench):
    settings = "--shape tiny --prompt 40 --answer 9 --steps 2 --csv".split()
    rows = bench("orpo", *settings, str(tmp_path / "b.csv"))["rows"]
    assert [row["variant"] for row in rows] == ["dense", "chunked", "chunked + shared"]
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) and row["p50"] > 0 for row in rows)
    assert {"variant", "total_gib"} <= rows[0].keys() and rows[0]["total_gib"] > rows[0]["peak_gib"]
    with open(tmp_path / "b.csv", newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == [row["variant"] for row in rows]


def test_the_variants_of_a_training_step_agree(tmp_path, capsys):
    options = Options(shape="tiny", prompt=40, answer=9, steps=1)
    make_inputs(tmp_path, options)
    for variant in OURS:
        orpo_step.main(asdict(options) | {"folder": tmp_path, "variant": variant})
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 3 and all(
        step["loss"] == pytest.approx(found[0]["loss"], rel=1e-5) for step in found
    )
    assert all(step["seconds"][0] > 0 for step in found)


def test_an_8b_model_trains_on_the_papers_rows_within_forty_gib(bench):
    rows = bench("memory")["rows"]
    totals = [row["total"] for row in rows if row["shared"]]
    assert min(totals) < 40 < max(totals)


def test_guided_tokens_are_measured_against_one_read_of_the_logits(tmp_path, bench):
    path = tmp_path / "g.csv"
    settings = (
        f"--no-compiled --methods greedy both --vocabularies 1000 500 --pairs 2 --calls 3 --plot --csv {path}"
    )
    rows = bench("guidance", *settings.split())["rows"]
    cases = [(row["method"], row["vocabulary"]) for row in rows]
    assert cases == [("greedy", 1000), ("greedy", 500), ("both", 1000), ("both", 500)]
    for row in rows:
        size = 2 * row["pairs"] * row["vocabulary"] * 2  # bytes: two rows of bfloat16 a pair
        assert row["bound"] == pytest.approx(size / READ / 1e3)  # in us
        assert row["share_of_read"] == pytest.approx(row["bound"] / row["p50"])
        assert row["gb_per_second"] == pytest.approx(size / row["p50"] / 1e3)
    assert (tmp_path / f"{path.name}.png").read_bytes().startswith(b"\x89PNG")


def test_torch_compile_is_measured_too(bench):
    rows = bench("guidance", *"--methods greedy --vocabularies 1000 --pairs 2 --calls 3".split())["rows"]
    assert [row["variant"] for row in rows] == ["reference, eager", "reference, torch.compile"]


@pytest.mark.parametrize("name", ["top-k", "top-p", "both"])
def test_every_variant_draws_what_the_method_keeps(name):
    """At a temperature at which almost every token would be drawn otherwise."""
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    method, options = METHODS[name], kernel_bench.Options(space="log", guidance=2.0, compiled=False)
    found = kernel_bench.variants(logits, method, options)
    assert set(found) == {"reference, eager", "transformers' formula"}
    pos = torch.arange(32)
    scores = reference.guided_logprobs(logits, reference.Sampling.uniform(pos, pos + 32, 2.0, "log", 1.0))
    kept = reference.truncate(scores, torch.full((32,), method.top_k), torch.full((32,), method.top_p))
    for tokens in (found["reference, eager"](logits)[0], found["transformers' formula"](logits)):
        assert kept.gather(-1, tokens[:, None]).isfinite().all()
    sampled = kernel_bench.variants(logits, METHODS["sampled"], options)["transformers' formula"](logits)
    assert not kept.gather(-1, sampled[:, None]).isfinite().all()


def test_greedy_tokens_are_those_of_transformers_formula():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    options = kernel_bench.Options(space="log", compiled=False)
    found = kernel_bench.variants(logits, METHODS["greedy"], options)
    assert found["reference, eager"](logits)[0].equal(found["transformers' formula"](logits))
    assert "transformers' formula" not in kernel_bench.variants(logits, METHODS["mask"], options)


def test_a_mask_leaves_plausible_tokens_only():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    options = kernel_bench.Options(compiled=False)
    tokens = kernel_bench.variants(logits, METHODS["mask"], options)["reference, eager"](logits)[0]
    probs = logits[:32].softmax(-1)
    assert (probs.gather(-1, tokens[:, None]) >= 0.1 * probs.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize(
    ("method", "drawn"),
    [
        ("sampled", ("sampling_from_probs", {})),
        ("mask", ("sampling_from_probs", {})),
        ("top-k", ("top_k_sampling_from_probs", {"top_k": 50})),
        ("top-p", ("top_p_sampling_from_probs", {"top_p": 0.9})),
        ("both", ("top_k_top_p_sampling_from_probs", {"top_k": 50, "top_p": 0.9})),
    ],
)
def test_flashinfer_draws_as_the_method_says(method, drawn, monkeypatch):
    class Sampling:
        def __getattr__(self, name):
            return lambda probs, **settings: (name, settings)

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(sampling=Sampling()))
    assert kernel_bench.flashinfer_draw(METHODS[method])(torch.ones(1, 1)) == drawn


def test_the_rate_of_reading_is_that_of_the_fastest_way(monkeypatch):
    times = iter([*[0.9] * 5, 0.8, 0.7, 0.5, 0.7, 0.8, *[0.6] * 5])  # the second way, in its third try
    monkeypatch.setattr(measure, "seconds", lambda call, device: next(times))
    assert measure.read_gb_per_second("cpu") == pytest.approx(3 * 2**30 / 0.5 / 1e9)


def test_decoding_is_measured_from_two_passes_to_the_engine(tmp_path, bench, monkeypatch):
    rates = iter([1.0, 8.0])  # before, while others are at work, and after
    monkeypatch.setattr(decode, "read_gb_per_second", lambda device: next(rates))
    path = tmp_path / "d.csv"
    settings = f"--shape tiny --runs 1 --new 4 --prompt 8 --batches 1 2 --no-transformers --plot --csv {path}"
    rows = bench("decode", *settings.split())["rows"]
    assert [row["variant"] for row in rows[:2]] == ["ours, two passes", "ours, pairs in one batch"]
    assert all(row["read_gb_per_second"] == 8 for row in rows)
    assert len(rows) == 10 and all(0 < row["first_token"] < row["p50"] for row in rows)
    assert (tmp_path / f"{path.name}.png").read_bytes().startswith(b"\x89PNG")
    assert {"variant", "requests", "of_unguided", "share_of_read"} <= rows[0].keys()


def test_the_figures_of_a_row_of_decoding():
    options = decode.Options(shape="tiny", prompt=10, new=5)
    times = [(0.5, 2.5), (1.0, 2.0), (0.5, 2.5)]  # the first tokens, all
    row = decode.row_of("ours, unguided", times, 2, 10**9, READ, options)
    assert (row["p50"], row["first_token"]) == (2.5, 0.5)
    assert row["prefill_per_second"] == 2 * 10 / 0.5
    assert row["tokens_per_second"] == 2 * 4 / 2.0
    assert row["gb_per_second"] == 4 / 2.0 and row["share_of_read"] == 0.2
    guided = decode.row_of("ours, pairs in one batch", times, 2, 10**9, READ, options)
    assert guided["prefill_per_second"] == 2 * row["prefill_per_second"]
    twice = decode.row_of("ours, two passes", times, 2, 10**9, READ, options)
    assert twice["gb_per_second"] == 2 * row["gb_per_second"]


def test_ratios_are_of_the_whole_time():
    seconds = {"ours, unguided": 2.0, "transformers, guidance_scale": 4.0, "transformers, unguided": 3.0}
    rows = [{"variant": name, "p50": value} for name, value in {"x": 1.0, **seconds}.items()]
    decode.add_ratios(rows)
    assert [rows[0][key] for key in ("of_unguided", "of_their_guided", "of_their_unguided")] == [2, 4, 3]
    assert rows[1]["of_unguided"] == 1


def test_variants_take_turns():
    said = []
    decoders = {}
    for name in "ab":
        decoders[name] = lambda first, name=name: (said.append(name), first())
    times = decode.time_in_turns(decoders, decode.Options(runs=2))
    assert said == list("ababab") and [len(found) for found in times.values()] == [2, 2]


def test_all_guided_decoders_say_the_same_and_when_the_first_tokens_are_there():
    options = decode.Options(shape="tiny", dtype="float32", prompt=3, new=8)
    ours, theirs = decode.load_models(options)
    prompts, negatives = [[5, 6, 7], [8, 9, 5]], [[9, 10, 11], [7, 7, 7]]
    found = decode.our_decoders(ours, prompts, negatives, options)
    found |= decode.their_decoders(theirs, prompts, negatives, options)
    calls, answers = [], {}
    with torch.inference_mode():
        for name, decoder in found.items():
            answers[name] = decoder(lambda name=name: calls.append(name))
    assert calls == list(found)
    unguided = [answers.pop(name) for name in (decode.OUR_UNGUIDED, decode.THEIR_UNGUIDED)]
    assert unguided[0] == unguided[1]
    mixed = answers.pop(decode.PROBABILITY_SPACE)
    for name, answer in answers.items():
        assert answer == answers["ours, two passes"], name
    assert mixed != answers["ours, two passes"] != unguided[0]
    assert [len(answer) for answer in mixed] == [8, 8]


def test_the_first_token_of_transformers_is_what_follows_the_prompts():
    said = []
    streamer = decode.Streamer(lambda: said.append("first"))
    streamer.put(torch.tensor([[5, 6, 7]]))
    assert not said
    streamer.put(torch.tensor([8]))
    streamer.put(torch.tensor([9]))
    assert said == ["first"]


def test_a_request_that_cannot_join_is_not_measured(monkeypatch):
    model = random_model(DECODE_SHAPES["tiny"], torch.float32, "cpu")
    engine = decode.Engine
    monkeypatch.setattr(
        decode, "Engine", lambda model, rows, slots: engine(model, rows=rows - 1, slots=slots)
    )
    with pytest.raises(decode.InputError, match="2 requests does not fit"):
        decode.serve(model, [decode.Request([5, 6], max_new_tokens=4)] * 2, lambda: None)


@pytest.mark.parametrize(
    ("shape", "millions"),
    [("224m", 224), ("221m", 222), ("smollm2-135m", 135), ("llama-3.2-1b", 1236), ("8b", 8030)],
)
def test_a_shape_has_as_many_weights_as_it_says(shape, millions):
    assert round(base_parameters(DECODE_SHAPES[shape]) / 1e6) == millions


def test_spread_of_one_and_of_many():
    assert spread([2.0]) == {"p20": 2.0, "p50": 2.0, "p80": 2.0}
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}


def test_an_unknown_space_is_one_line(bench, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        bench("guidance", "--space", "both")
    assert capsys.readouterr().err == "error: --space both: must be one of prob, log\n"


def test_the_processor_is_named_with_what_it_can(tmp_path):
    known = tmp_path / "cpuinfo"
    known.write_text(
        "processor\t: 0\nmodel name\t: Fast CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_bf16\nbugs: avx512f\n"
    )
    assert table.processor(known) == "Fast CPU @ 2 GHz avx512_bf16 avx2"
    assert table.processor(tmp_path / "none").endswith(" CPU")


def test_the_driver_is_named(tmp_path):
    known = tmp_path / "version"
    known.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build\n")
    assert table.driver(known) == "560.35.03"
    assert table.driver(tmp_path / "none") == "unknown"


def test_rows_of_other_columns_are_not_appended(tmp_path, capsys):
    path = tmp_path / "new" / "b.csv"
    table.append(str(path), [{"a": 1, "b": 2}])
    table.append(str(path), [{"a": 3, "b": 4}])
    with pytest.raises(SystemExit, match="^2$"):
        table.append(str(path), [{"a": 3, "c": 4}])
    assert capsys.readouterr().err == f"error: {path}: has other columns than these rows; name another file\n"
    assert path.read_text() == "a,b\n1,2\n3,4\n"


def decoded(variant: str, requests: int, of_unguided: float, share: float) -> dict:
    return {"variant": variant, "requests": requests, "of_unguided": of_unguided, "share_of_read": share}


def guided(method: str, vocabulary: int, pairs: int, us: float, share: float) -> dict:
    row = {"variant": "kernel", "method": method, "vocabulary": vocabulary, "pairs": pairs}
    return row | {"p50": us, "share_of_read": share}


def test_goals_are_compared_with_the_tables(tmp_path):
    """The worst row counts, other rows do not, and what is missing was not measured."""
    graph, mixed = decode.CUDA_GRAPH, decode.PROBABILITY_SPACE
    tables = {
        "decode-8b": [
            decoded(graph, 1, 0.97, 0.69),
            decoded(graph, 32, 0.96, 0.3),
            decoded(mixed, 1, 0.99, 0.7),
            decoded(mixed, 32, 0.94, 0.3),
            decoded("ours, two passes", 1, 0.5, 0.9),
        ],
        "guidance": [guided("greedy", 128256, 32, 50.0, 0.49), guided("greedy", 128256, 64, 20.0, 0.1)],
        "guidance-131072": [guided("top-p", 131072, 128, 139.0, 0.1), guided("both", 131072, 128, 268, 0.1)],
        "orpo": [{"variant": "dense", "total_gib": 60.0}, {"variant": "chunked + shared", "total_gib": 40.5}],
    }
    for name, rows in tables.items():
        table.append(str(tmp_path / f"{name}.csv"), rows)
    found = {row["goal"]: (row["bound"], row["measured"], row["verdict"]) for row in goals.compare(tmp_path)}
    assert found == {
        "8B, guided / unguided": ("at least 0.95", "0.96", "met"),
        "8B, guided in probability space / unguided": ("at least 0.95", "0.94", "missed"),
        "1B, guided / unguided": ("at least 0.95", "not measured", ""),
        "8B, guided, 1 request: share of the read bandwidth": ("at least 0.69", "0.69", "met"),
        "kernel, greedy, V 128,256, 32 pairs: one read / time": ("at least 0.5", "0.49", "missed"),
        "kernel, top-p, V 131,072, 128 pairs: us": ("at most 139", "139", "met"),
        "kernel, top-k and top-p, V 131,072, 128 pairs: us": ("at most 267", "268", "missed"),
        "ORPO step, 8B: GiB": ("at most 48", "40.5", "met"),
    }


def test_the_commands_for_a_gpu_measure_what_the_goals_are_about(tmp_path):
    """Their options parse, and the methods, sizes and requests of the goals are among them."""
    measured = {}
    for name in gpu.COMMANDS:
        module, *words = gpu.arguments(name, tmp_path, 48.0)
        if module != "pytest":
            measured[name] = tyro.cli(BENCHES[words[0]][0], args=words[1:])
            assert measured[name].device == "cuda" and measured[name].csv == str(tmp_path / f"{name}.csv")
    assert {goal.file for goal in goals.GOALS} <= set(measured)
    assert measured["orpo"].memory_gib == measured["decode-8b"].memory_gib == 48
    for goal in goals.GOALS:
        options, where = measured[goal.file], goal.where
        if "method" in where:
            assert where["method"] in options.methods and int(where["pairs"]) in options.pairs
            assert int(where["vocabulary"]) in options.vocabularies
        if "requests" in where:
            assert int(where["requests"]) in options.batches


def test_a_command_that_fails_is_said_and_leaves_no_earlier_figures(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(
        gpu, "COMMANDS", {"decode-8b": f"{gpu.BENCH} nothing", "orpo": f"{gpu.BENCH} memory --pairs 1"}
    )
    for name in ("decode-8b.csv", "decode-8b.csv.png", "mine.csv"):
        (tmp_path / name).write_text("of another run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(table, "where", lambda device: {"machine": device})
    with pytest.raises(SystemExit, match="^1$"):
        gpu.run(gpu.Options(out=str(tmp_path)))
    out, err = capfd.readouterr()
    assert "decode-8b: FAILED in" in out and "orpo: done in" in out and err.endswith("FAILED: decode-8b\n")
    assert "not measured" in out
    assert {path.name for path in tmp_path.iterdir()} == {"mine.csv", "orpo.csv", "goals.csv"}


def test_without_a_gpu_nothing_is_claimed(bench, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="^2$"):
        bench("gpu")
    assert capsys.readouterr().err.startswith("error: no CUDA device is there")
