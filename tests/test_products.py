"""Products chosen by timing: each way gives W x, and a prepared model is the same model, until released."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model

from cfgsafe import products
from cfgsafe.decode import Request, generate
from cfgsafe.lora import LoRAConfig, adapter_parameters, attach, merge, set_adapters
from cfgsafe.products import ROWS, Found, Linear, Product, prepare, release

WAYS = ("rows", "columns", "packed")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def prepare_model(model, *, may_pack: bool) -> None:
    prepare(model.groups(), model.model.embed_tokens.weight, may_pack=may_pack)


def found(way: str) -> Found:
    return Found((way,) * len(ROWS), (1.0,) * len(ROWS))


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every weight is large enough, and this way is found for all of those that it may serve."""
    if request.param == "packed" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")

    def find(weights, *, may_pack):
        return found("rows" if request.param == "packed" and not may_pack else request.param)

    monkeypatch.setattr(products, "FOUND", {})
    monkeypatch.setattr(products, "LEAST_BYTES", 0)
    monkeypatch.setattr(products, "find", find)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1), (3, 5), (8, 8), (65,), (2, 100)])
def test_each_way_is_the_product(way, rows, dtype):
    if way == "packed" and not products.packs_here(dtype):
        pytest.skip("no packed products of this data type on this processor")
    torch.manual_seed(0)
    weight, x = torch.randn(24, 40), torch.randn(*rows, 40)
    with torch.no_grad():
        y = Product(weight.to(dtype), found(way))(x.to(dtype))
    wanted = F.linear(x.to(dtype).double(), weight.to(dtype).double())
    torch.testing.assert_close(y.double(), wanted, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)
    assert y.dtype == dtype


def test_numbers_of_rows_go_the_way_of_the_next_larger_one_timed():
    ways = tuple("columns" if rows in (2, 16) else "rows" for rows in ROWS)
    product = Product(torch.randn(4, 4), Found(ways, (1.0,) * len(ROWS)))
    assert [rows for rows in range(1, 65) if product.way_of[rows] is products.by_columns] == [
        2,
        *range(9, 17),
    ]


def model_with_adapters(**changes):
    """With biases, and two adapters; the head is not tied unless `changes` say so."""
    model = random_model(**{"attention_bias": True, "tie_word_embeddings": False, **changes})
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        for parameter in attach(model, LoRAConfig(rank=2), name):
            torch.nn.init.normal_(parameter, std=0.3)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


@pytest.mark.parametrize("tied", [False, True])
def test_a_prepared_model_is_the_same_model(way, tied):
    model = model_with_adapters(tie_word_embeddings=tied)
    prepared = copy.deepcopy(model)
    prepare_model(prepared, may_pack=True)
    tokens = torch.randint(0, 2000, (3, 7))
    for each in (model, prepared):
        set_adapters(each, ["one", None, "two"])
    with torch.no_grad():
        for count in (1, 3):
            here, there = model(tokens[:, :count]), prepared(tokens[:, :count])
            torch.testing.assert_close(model.head(here), prepared.head(there), atol=1e-4, rtol=1e-4)
    requests = []
    for number, adapter in enumerate(("one", "two", None)):
        negative = [7, 8, 9 + number]
        guided = Request([5 + number] * 3, negative, guidance=2.0, space="log", adapter=adapter)
        requests += [guided, Request([3, 4, number], adapter=adapter)]
    answers = [generate(each, requests) for each in (model, prepared)]
    assert [a.tokens for a in answers[0]] == [b.tokens for b in answers[1]]


def test_weights_are_held_once(way):
    model = model_with_adapters()
    groups = model.groups()
    before = sum(layer.weight.numel() for group in groups for layer in group)
    prepare_model(model, may_pack=True)
    held = {layer.weight.untyped_storage().data_ptr(): layer.weight for group in groups for layer in group}
    plain = sum(weight.untyped_storage().nbytes() for weight in held.values()) // 4
    head = model.lm_head.weight.numel()
    assert plain == (head if way == "packed" else before)
    assert model.lm_head.base.product is not None and not model.lm_head.base.product.found.packs


@needs_onednn
def test_a_tied_head_is_packed_beside_the_embedding(monkeypatch):
    monkeypatch.setattr(products, "FOUND", {})
    monkeypatch.setattr(products, "LEAST_BYTES", 0)
    monkeypatch.setattr(products, "find", lambda weights, may_pack: found("packed" if may_pack else "rows"))
    model = random_model()
    embedding = model.model.embed_tokens.weight.clone()
    prepare_model(model, may_pack=True)
    assert model.lm_head.product.found.packs and torch.equal(model.lm_head.weight, embedding)
    prepare_model(model, may_pack=False)
    assert not model.lm_head.product.found.packs


def test_release_gives_the_weights_back_to_the_bit(way):
    model = model_with_adapters()
    before = copy.deepcopy(model.state_dict())
    prepare_model(model, may_pack=True)
    release(model.groups())
    assert all(layer.product is None and layer.joint is None for group in model.groups() for layer in group)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_merging_releases(way):
    model = model_with_adapters()
    prepared = copy.deepcopy(model)
    prepare_model(prepared, may_pack=True)
    for each in (model, prepared):
        merge(each, "one")
    tokens = torch.randint(0, 2000, (2, 5))
    with torch.no_grad():
        assert torch.equal(model(tokens), prepared(tokens))


def test_adapters_of_a_prepared_model_can_be_trained(way):
    model = model_with_adapters()
    prepared = copy.deepcopy(model)
    prepare_model(prepared, may_pack=False)
    gradients = []
    for each in (model, prepared):
        trained = adapter_parameters(each, "one")
        for parameter in trained.values():
            parameter.requires_grad_(True)
        each(torch.arange(12).view(2, 6)).square().sum().backward()
        gradients.append([parameter.grad for parameter in trained.values()])
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*gradients, strict=True))


def choose(monkeypatch, columns: list[float], packed: list[float] | None) -> Found:
    """What is found where nn.Linear takes a second for each number of rows, and the others these."""

    def seconds(ways):
        for place in range(len(ROWS)):
            times = {"rows": 1.0, "columns": columns[place]}
            yield times | ({} if packed is None else {"packed": packed[place]})

    monkeypatch.setattr(products, "seconds", seconds)
    return products.find([torch.randn(8, 8)], may_pack=packed is not None)


def test_another_way_must_be_clearly_faster(monkeypatch):
    ways = choose(monkeypatch, [0.95, 0.85, 2.0, 0.5, 0.91, 0.89], None).ways
    assert ways == ("rows", "columns", "rows", "columns", "rows", "columns")


@needs_onednn
def test_packing_must_pay_on_average_and_cost_a_single_request_nothing(monkeypatch):
    slow = [2.0] * 6
    assert choose(monkeypatch, slow, [0.99, 0.99, 0.5, 0.5, 0.5, 0.5]).ways == ("packed",) * 6
    assert choose(monkeypatch, slow, [1.01, 0.5, 0.5, 0.5, 0.5, 0.5]).ways == ("rows",) * 6
    assert choose(monkeypatch, slow, [0.95, 0.95, 0.95, 0.95, 0.95, 0.95]).ways == ("rows",) * 6
    faster = choose(monkeypatch, [0.5] * 6, [0.6] * 6)  # than nn.Linear's, but not than the other way
    assert faster.ways == ("columns",) * 6


def test_the_clock_decides(monkeypatch):
    """A way that takes longer by the clock is not chosen, whichever it is."""
    for slow in ("rows", "columns"):
        now = [0.0]
        monkeypatch.setattr(products.time, "perf_counter", lambda now=now: now[0])

        def timed(name, now=now, slow=slow):
            plain = {"rows": products.by_rows, "columns": products.by_columns}[name]

            def call(x, weight):
                now[0] += 2.0 if name == slow else 1.0
                return plain(x, weight)

            return call

        monkeypatch.setattr(products, "WAYS", {name: timed(name) for name in ("rows", "columns")})
        chosen = products.find([torch.randn(8, 8)], may_pack=False)
        assert set(chosen.ways) == {"rows", "columns"} - {slow}
        assert chosen.gb_per_second == pytest.approx((8 * 8 * 4 / 1e9,) * len(ROWS))


def test_what_was_found_is_kept_for_the_process(way, monkeypatch):
    prepare_model(random_model(), may_pack=False)
    monkeypatch.setattr(products, "find", None)
    prepare_model(random_model(seed=1), may_pack=False)
    with pytest.raises(TypeError):
        prepare_model(random_model(hidden_size=64), may_pack=False)


def test_small_weights_are_left_alone():
    model = random_model()
    prepare_model(model, may_pack=True)
    assert all(layer.product is None and layer.joint is None for group in model.groups() for layer in group)
    assert products.table(model.groups()) == "products: as nn.Linear computes them"


def test_the_table_names_each_shape_once(way):
    model = random_model(num_hidden_layers=3, tie_word_embeddings=False)
    prepare_model(model, may_pack=False)
    lines = products.table(model.groups()).splitlines()
    assert len(lines) == 1 + 5 and lines[1].startswith("(64, 32)   1 ") and "16 " in lines[1]


def test_a_layer_whose_weight_is_packed_says_so_to_a_gradient(way):
    model = model_with_adapters()
    prepare_model(model, may_pack=True)
    if way != "packed":
        return
    layer = model.model.layers[0].mlp.down_proj.base
    assert isinstance(layer, Linear)
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, layer.in_features))


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens():
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    model = random_model().double()
    requests = [Request([5, 6, 7], [8, 9], guidance=2.0, space="log", max_new_tokens=8), Request([3, 4])]
    plain = generate(model, requests)
    model.compile_steps()
    compiled = generate(model, requests)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert [a.tokens for a in plain] == [b.tokens for b in compiled]
    assert all(not completion.failure for completion in compiled)
