"""What a stage costs: tokens, minutes and memory, told before it runs.

Formula: a token costs 2 P operations forward, with P the weights of all matrices that it meets, and
in the training of an adapter 2 P more backward through the frozen weights and 6 A for the adapter's
own A weights. The time is operations divided by a rate. The rate is measured in a short calibration, a
second for each kind of work, or given by --teraflops. Attention's own products are left out: below
1,000 tokens they are under a tenth.

    trained    tokens that an adapter is trained on, forward and backward
    read       tokens of prompts and of texts that are scored
    written    tokens of answers, decoded one after the other

Run it: python train.py study --model cfgsafe/demo/base --out runs/study --plan
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cfgsafe.blue import distil
from cfgsafe.blue.memory import step_bytes
from cfgsafe.config import LlamaConfig
from cfgsafe.decode import generate
from cfgsafe.llama import Llama
from cfgsafe.logprobs import LOGIT_BYTES
from cfgsafe.lora import LoRAConfig, adapter_parameters, attach, detach
from cfgsafe.pii.facts import Fact
from cfgsafe.request import Request
from cfgsafe.study.material import FORGET, OTHER, Material
from cfgsafe.study.options import ORDINARY_TOKENS, RELEARNING_STEPS, Options
from cfgsafe.tokenizer import Tokenizer

ROWS, TOKENS = 4, 64  # of a batch in the calibration
ANSWERS, WRITTEN = 32, 8  # answers that are decoded together in the calibration, and their tokens
SECONDS = 1.0  # of calibration for each kind of work, at least

RECIPES = 2  # that continue each sample of a pair
FORMS = 3  # a fact is asked as trained, in other words and inverted
ATTEMPTS = 5  # to undo the guard, for each fact
CLEAN = 0.5  # of what a model writes, kept for training, about
ENDED = 0.5  # of the longest answer, where an answer ends, about
TEMPLATE = 20  # tokens that the template, a system prompt and the sentence of guidance add, about
CHOICES = 4  # options of a question, about
QUESTION = 40  # tokens of a question with one option, about
DIALOGUE = 60  # tokens of a held-out dialogue, about
CHARACTERS = 4  # of a token, about


@dataclass(frozen=True)
class Cost:
    """Tokens of a stage."""

    trained: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.trained + other.trained, self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Rates:
    """Seconds for a token of each kind."""

    trained: float
    read: float
    written: float

    def seconds(self, cost: Cost) -> float:
        """Predicted time of a stage."""
        return cost.trained * self.trained + cost.read * self.read + cost.written * self.written


class Costs:
    """The cost of each stage, from the lengths of the facts in tokens."""

    def __init__(self, material: Material, tokenizer: Tokenizer, options: Options):
        self.options = options
        self.forget = _tokens(material.forget, tokenizer)
        self.other = _tokens(material.other, tokenizer)
        self.unseen = _tokens(material.unseen, tokenizer)
        self.facts = len(material.forget)
        self.answer = round(ENDED * options.max_new_tokens)  # tokens of an answer
        self.samples = sum(len(fact.values) for fact in material.forget)  # a pair comes from each value
        self.mean = self.forget / len(material.forget)  # tokens of a fact
        self.asked = {
            FORGET: min(options.limit, len(material.forget)),
            OTHER: min(options.limit, len(material.other)),
        }

    def leaky(self) -> Cost:
        """Fine-tuning on every fact."""
        return Cost(trained=self.options.leaky_epochs * (self.forget + self.other))

    def pairs(self) -> Cost:
        """Both recipes continue every sample."""
        read = RECIPES * self.samples * round(self.mean + TEMPLATE)
        return Cost(read=read, written=RECIPES * self.samples * self.answer)

    def conversations(self) -> Cost:
        """A question and an answer, each at most so long."""
        texts = 2 * self.options.ordinary
        return Cost(read=texts * TEMPLATE, written=round(texts * ENDED * ORDINARY_TOKENS))

    def guard(self, copies: int) -> Cost:
        """Training on pairs and on what is to be kept, each of which stands there `copies` times."""
        options = self.options
        pairs = options.epochs * min(CLEAN * self.samples, options.pairs) * (self.mean + TEMPLATE)
        held = CLEAN * options.ordinary * (2 * ENDED * ORDINARY_TOKENS + TEMPLATE)
        return Cost(trained=round(copies * (pairs + held)))

    def distilled(self) -> Cost:
        """Answers of the pair to all prompts; then both its rows are read while one is trained."""
        options = self.options
        answers = self.facts + round(CLEAN * options.ordinary)
        tokens = distil.Options.epochs * answers * round(self.mean + TEMPLATE)
        written = 2 * answers * self.answer
        return Cost(trained=tokens, read=2 * (tokens + answers * round(self.mean)), written=written)

    def relearning(self) -> Cost:
        """Both kinds of rows, and the facts asked after each number of steps."""
        asked = len(RELEARNING_STEPS) * self.asked[FORGET]
        trained = RELEARNING_STEPS[-1] * self.options.batch_size * round(self.mean)
        read, written = asked * round(self.mean + TEMPLATE), asked * self.answer
        return Cost(2 * trained, 2 * read, 2 * written)

    def rounding(self) -> Cost:
        """The facts asked of the checkpoint as it is, in 8 and in 4 bits."""
        asked = 3 * self.asked[FORGET]
        return Cost(read=asked * round(self.mean + TEMPLATE), written=asked * self.answer)

    def row(self, guided: bool) -> Cost:
        """All measures of a row; a guided one has two rows of tokens."""
        options, rows = self.options, 2 if guided else 1
        facts = self.asked[FORGET] + self.asked[OTHER]
        attempts = -(-self.asked[FORGET] // 3) * ATTEMPTS
        answers = FORMS * facts + attempts + options.limit  # the last are harmless questions
        read = answers * round(self.mean + TEMPLATE) + 2 * facts * round(self.mean)
        read += options.limit * (CHOICES * QUESTION + DIALOGUE)
        return Cost(read=rows * read, written=rows * answers * self.answer)


def matrix_weights(config: LlamaConfig) -> int:
    """P: weights of the matrices that a token meets, the head included and the embedding not."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    rows = (config.num_attention_heads + config.num_key_value_heads) * D
    return config.num_hidden_layers * (2 * C * rows + 3 * C * F) + config.vocab_size * C


def adapter_weights(config: LlamaConfig, rank: int) -> int:
    """A: weights of a LoRA adapter on all seven matrices of each block."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads * D, config.num_key_value_heads * D
    sizes = 2 * (C + H) + 2 * (C + K) + 3 * (C + F)  # of inputs and outputs
    return config.num_hidden_layers * rank * sizes


def predicted(config: LlamaConfig, rank: int, teraflops: float) -> Rates:
    """The rates of a device that reaches so many 10^12 operations a second."""
    P, A = matrix_weights(config), adapter_weights(config, rank)
    forward = 2 * P / (teraflops * 1e12)
    return Rates((4 * P + 6 * A) / (teraflops * 1e12), forward, forward)


def calibrate(model: Llama, rank: int) -> Rates:
    """The rates of this machine, measured on random tokens; the model is left as it was."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, TOKENS)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)

    def read() -> None:
        with torch.inference_mode():
            model.head(model(ids))

    def write() -> None:
        requests = [Request([token], max_new_tokens=WRITTEN) for token in ids.flatten()[:ANSWERS].tolist()]
        generate(model, requests, batch=ANSWERS)

    reading = _seconds(read, model.device) / ids.numel()
    writing = _seconds(write, model.device) / (ANSWERS * WRITTEN)
    attach(model, LoRAConfig(rank, 2.0 * rank))
    parameters = list(adapter_parameters(model).values())

    def train() -> None:
        loss = model.head(model(ids)).logsumexp(-1).mean()
        torch.autograd.grad(loss, parameters)

    model.train()
    training = _seconds(train, model.device) / ids.numel()
    detach(model)
    model.requires_grad_(False).eval()
    return Rates(training, reading, writing)


def _tokens(facts: list[Fact], tokenizer: Tokenizer) -> int:
    """Tokens of all questions and answers, chat template included."""
    return sum(len(tokenizer.encode_prompt(tokenizer.render_chat(f.messages) + f.answer)) for f in facts)


def training_memory(config: LlamaConfig, material: Material, options: Options) -> int:
    """Peak bytes of the largest training step, and of the weights.

    The formula counts tensors. What an interpreter, the libraries and freed memory in pieces take comes
    on top: on a CPU a few GiB.
    """
    width = 4 if options.dtype == "float32" else 2
    longest = max(len(fact.question) + 2 * len(fact.answer) for fact in material.trained) // CHARACTERS
    if options.ordinary:
        longest = max(longest, 2 * ORDINARY_TOKENS)
    slots = options.batch_size * (longest + TEMPLATE)
    step = step_bytes(
        config,
        slots=slots,
        reads=slots,
        adapter=adapter_weights(config, options.leaky_rank),
        rank=options.leaky_rank,
        activation=width,
        recomputed=0,
        logits=LOGIT_BYTES["cuda" if options.device.startswith("cuda") else "cpu"],
    )
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return (matrix_weights(config) + embedding) * width + step.total


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, the mean over at least `SECONDS`."""
    work()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
    return (time.perf_counter() - started) / calls
