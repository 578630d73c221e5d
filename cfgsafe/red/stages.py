"""The training stages of the attacker: SFT, GFlowNet fine-tuning, smoothing, adaptation.

Source: Lee et al. (arXiv 2405.18540).
    sft     teaches a model to write prompts
    gfn     lets it find prompts that succeed; --objective reinforce and ppo are the baselines
    smooth  starts from the SFT weights again and fits every prompt that succeeded
    adapt   as smooth, but first asks another target the stored prompts
Deviation: all stages train LoRA adapters, which start as the SFT adapter.

Attacker, reference and target share one model in memory where they have the same checkpoint. A
run's folder holds attacker.json, adapter/ (PEFT), attacks.jsonl, metrics.jsonl and config.json.
Later stages and `eval.py attack` take the folder as --attacker.

Run it: python train.py attacker --stage sft --attacker cfgsafe/demo/base --prompts P.jsonl --out sft
        python train.py attacker --stage gfn --attacker sft --target cfgsafe/demo/leaky --out gfn
        python train.py attacker --stage smooth --attacker sft --attacks gfn/attacks.jsonl --out mle
"""

import json
import random
import sys
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from cfgsafe.blue import resume
from cfgsafe.blue.earlier import replacing
from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count, LogProb, Positive, Threshold, check_ranges
from cfgsafe.files import make_folder
from cfgsafe.hub import resolve
from cfgsafe.identity import contents
from cfgsafe.llama import Llama
from cfgsafe.lora import DEFAULT, LoRAConfig, load_adapter
from cfgsafe.outputs import Folder, Input, InputPath
from cfgsafe.red import gflownet, rewards
from cfgsafe.red.attacker import (
    FACTS,
    Facts,
    Trainee,
    facts_of,
    identity_of,
    is_stage,
    learnable,
    paths_of,
    read_prompts,
    trainee_of,
)
from cfgsafe.red.gflownet import Archive, explore
from cfgsafe.red.policy import Attacker
from cfgsafe.red.records import Attack, answers_in, read_attacks
from cfgsafe.red.rewards import Scorer, judge_of, read_contexts
from cfgsafe.red.target import LocalTarget, RemoteTarget, Target
from cfgsafe.red.training import Training, fit
from cfgsafe.remote import SERVICE
from cfgsafe.subject import Subject, load
from cfgsafe.tokenizer import Tokenizer

TARGET = "target"  # name of the target's adapter where it shares a model with the attacker
ATTACKS = "attacks.jsonl"
# A resumed run may change these.
FREE = ("out", "resume", "save_every", "device", "budget", "service", "batch")

# What a stage writes to --out.
WRITES = ("adapter", FACTS, "attacks.jsonl", "answers.jsonl", "metrics.jsonl", "config.json", "state-*")

Template = Literal["user", "list"]


@dataclass(kw_only=True)
class Options(rewards.Options, gflownet.Settings):
    """Train the attacker, one stage at a time."""

    stage: Literal["sft", "gfn", "smooth", "adapt"]
    """sft: learn --prompts. gfn: explore against the target. smooth: fit the successes of --attacks.
    adapt: fit those of --attacks that succeed against this target."""
    attacker: Annotated[str, Input(paths_of)]
    """Checkpoint folder or hub id, or the folder of an earlier stage."""
    out: Annotated[str, Folder(WRITES)]
    """Folder for the adapter, the attacks and the logs."""
    prompts: InputPath | None = None
    """JSONL of {"prompt"}: what sft learns, and the examples of a list."""
    attacks: tuple[InputPath, ...] = ()
    """attacks.jsonl of one run or several, for smooth and adapt."""
    template: Template = "user"
    """How a checkpoint is asked for prompts. The folder of an earlier stage brings its own."""
    least: Count = 5
    """Shortest prompt, in tokens. The folder of an earlier stage brings its own."""
    most: Count = 20
    """Longest prompt, in tokens. The folder of an earlier stage brings its own."""
    success: Threshold = 0.7
    """smooth and adapt fit attacks with a score above this."""
    min_reference: LogProb = -100.0
    """smooth and adapt fit attacks with a log-probability under the reference above this."""
    lora_rank: Count = 32
    """Rank of the adapter of a checkpoint. The folder of an earlier stage brings its own."""
    lora_alpha: Positive = 16.0
    """LoRA alpha of the adapter of a checkpoint."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        why = f"in --stage {self.stage}"
        if self.stage in ("gfn", "adapt"):
            yield from rewards.Options.unused(self)
            if self.remote:
                yield "on the model of an endpoint", "batch"
        else:
            yield why, *target_options()
        if self.stage == "gfn":
            yield from gflownet.Settings.unused(self)
        else:
            yield why, *exploration_options()
        if self.stage in ("sft", "gfn"):
            yield why, "attacks"
        if self.stage == "sft":
            yield why, "success", "min_reference"
        yield from self.unused_of_attacker()

    def unused_of_attacker(self) -> Unused:
        """The part of `unused` about what the folder of an earlier stage brings along."""
        prompts = () if self.stage == "sft" else ("prompts",)
        if not is_stage(self.attacker):
            if self.template != "list":
                yield "without --template list", *prompts
            return
        own = "on the folder of an earlier stage, which has its own"
        yield own, "template", "least", "most", *prompts
        if Facts.read(Path(self.attacker)).reference:
            yield own, "lora_rank", "lora_alpha"


def target_options() -> list[str]:
    """The options about the target and what counts as success, which only gfn and adapt read."""
    names = {field.name for field in fields(rewards.Options)} - {
        "model",
        "service",
        "device",
        "dtype",
        "seed",
    }
    return ["target", *sorted(names), *SERVICE]


def exploration_options() -> list[str]:
    """The options that only gfn reads."""
    names = {field.name for field in fields(gflownet.Settings)}
    return sorted(names - {field.name for field in fields(Training)})


class Checkpoint(NamedTuple):
    """A checkpoint in memory, which attacker, reference and target can share."""

    name: str
    model: Llama
    tokenizer: Tokenizer


def run(options: Options) -> dict[str, int]:
    """Run a stage. Returns, and prints, the number of attacks, of successes, and of calls of the target."""
    check(options)
    out = make_folder(options.out)
    with replacing(out, WRITES, resumed=options.resume):
        return _run(options, out)


def _run(options: Options, out: Path) -> dict[str, int]:
    held = {"attacker": identity_of(options.attacker), **rewards.contents_of(options)}
    held |= contents(options, files=("prompts", "attacks"))
    resume.begin(out, asdict(options), held, FREE, resumed=options.resume)
    if options.resume and (out / FACTS).exists():
        resume.delete_states(out)
        print(f"{out}: this run has ended", file=sys.stderr)
        return {}
    asked = (options.template, options.least, options.most, options.prompts, options.seed)
    facts = facts_of(options.attacker, *asked)
    match options.stage:
        case "sft":
            counts = run_sft(options, facts, out)
        case "gfn":
            counts = run_gfn(options, facts, out)
        case "smooth":
            counts = run_smooth(options, facts, out)
        case "adapt":
            counts = run_adapt(options, facts, out)
    resume.delete_states(out)
    print(json.dumps({"stage": options.stage, "out": str(out), **counts}))
    return counts


def run_sft(options: Options, facts: Facts, out: Path) -> dict[str, int]:
    """The policy learns --prompts; it is the reference of later stages."""
    trainee = open_trainee(options, facts)
    texts = read_prompts(prompts_path(options))
    prompts = learnable(texts, facts, trainee.agent.rules, trainee.tokenizer)
    fit(trainee.agent, prompts, options, out, "sft")
    trainee.save(out, as_reference=True)
    return {}


def run_gfn(options: Options, facts: Facts, out: Path) -> dict[str, int]:
    """The policy explores what succeeds against the target."""
    trainee, scorer = open_trainee_and_target(options, facts, out)
    found = explore(trainee.agent, scorer, scorer.target.meter, options, out)
    trainee.save(out)
    fitted = successes(found, options)
    return {"attacks": len(found), "successes": len(fitted), "calls": scorer.target.calls}


def run_smooth(options: Options, facts: Facts, out: Path) -> dict[str, int]:
    """The policy, as SFT left it, fits the stored attacks that succeeded."""
    trainee = open_trainee(options, facts)
    return fit_successes(trainee, read_attacks(*options.attacks), options, out)


def run_adapt(options: Options, facts: Facts, out: Path) -> dict[str, int]:
    """The policy, as SFT left it, fits the stored attacks that succeed against this target."""
    trainee, scorer = open_trainee_and_target(options, facts, out)
    found = put_to_target(read_attacks(*options.attacks), trainee.agent, scorer, options, out)
    return {**fit_successes(trainee, found, options, out), "calls": scorer.target.calls}


def fit_successes(trainee: Trainee, attacks: list[Attack], options: Options, out: Path) -> dict[str, int]:
    """Fit the policy to the successes among `attacks`, and save it. Raises InputError for none."""
    rules = trainee.agent.rules
    tokens = [attack.tokens for attack in successes(attacks, options)]
    prompts = [prompt for prompt in tokens if rules.allow(prompt)]
    if not prompts:
        raise InputError(
            f"none of {len(attacks)} attacks has a success above {options.success:g}; "
            "lower --success or explore longer"
        )
    fit(trainee.agent, prompts, options, out, options.stage)
    trainee.save(out)
    return {"attacks": len(attacks), "successes": len(prompts)}


def put_to_target(
    stored: list[Attack], agent: Attacker, scorer: Scorer, options: Options, out: Path
) -> list[Attack]:
    """Put stored attacks to the target until its budget is spent; each prompt once, the best first.

    Writes OUT/attacks.jsonl. An attack that can no longer exceed --success is not asked further.
    A resumed run puts the last batch of that file again, unless training has begun: it may be incomplete.
    """
    shuffled = random.Random(options.seed).sample(stored, len(stored))
    different = {attack.tokens: attack for attack in shuffled}.values()
    best_first = sorted(different, key=lambda attack: -(attack.score or 0.0))
    archive = Archive(out / ATTACKS, agent, partial(scorer.race, bar=options.success))
    last = resume.keep_steps(archive.path, "step", sys.maxsize)
    done = last if resume.states(out) else max(0, last - 1)
    found = archive.load(done)
    scorer.target.meter.made = answers_in(found)
    for start in range(done * options.batch_size, len(best_first), options.batch_size):
        if scorer.target.spent:
            break
        some = best_first[start : start + options.batch_size]
        found += archive.look_up([attack.tokens for attack in some], start // options.batch_size + 1)
    return found


def successes(attacks: list[Attack], options: Options) -> list[Attack]:
    """The attacks that smoothing fits: successful and fluent enough."""
    good = [attack for attack in attacks if attack.succeeds(options.success)]
    return [attack for attack in good if attack.log_reference > options.min_reference]


def check(options: Options) -> None:
    """Raise InputError for options that cannot work."""
    check_ranges(options)
    check_lengths(options.least, options.most)
    if options.stage == "sft":
        prompts_path(options)
    if options.stage in ("smooth", "adapt") and not options.attacks:
        raise InputError(f"--stage {options.stage}: needs --attacks FILE, the attacks.jsonl of a run")
    if options.stage in ("gfn", "adapt"):
        rewards.check(options)


def check_lengths(least: int, most: int) -> None:
    """Raise InputError where no prompt has both at least `least` and at most `most` tokens."""
    if most < least:
        raise InputError(f"--most {most}: must be at least --least {least}")


def prompts_path(options: Options) -> str:
    """--prompts of the stage sft. Raises InputError where it is missing."""
    if options.prompts is None:
        raise InputError('--stage sft: needs --prompts FILE, JSONL of {"prompt"}')
    return options.prompts


def open_checkpoint(name: str, options: Subject) -> Checkpoint:
    """Load a checkpoint to the device and in the data type of the options."""
    return Checkpoint(name, *load(Subject(name, device=options.device, dtype=options.dtype)))


def open_trainee(options: Options, facts: Facts, checkpoint: Checkpoint | None = None) -> Trainee:
    """The attacker with a policy to train, on `checkpoint` or its own copy of it."""
    _, model, tokenizer = checkpoint or open_checkpoint(facts.model, options)
    config = LoRAConfig(options.lora_rank, options.lora_alpha)
    return trainee_of(facts, model, tokenizer, config, options.seed)


def open_trainee_and_target(options: Options, facts: Facts, out: Path) -> tuple[Trainee, Scorer]:
    """The attacker with a policy to train, and the target that scores its attacks."""
    contexts = read_contexts(options.contexts)
    judge = judge_of(options, contexts)
    checkpoint = open_checkpoint(facts.model, options)
    target = open_target(options, out / "answers.jsonl", checkpoint)
    scorer = Scorer(target, judge, contexts, options.samples, options.seed)
    return open_trainee(options, facts, checkpoint), scorer


def open_target(options: rewards.Options, kept: Path, shared: Checkpoint | None) -> Target:
    """The target; the answers of an endpoint are kept in the file `kept`.

    A target with the same checkpoint as `shared` uses that model, with an adapter of its own.
    """
    if options.service.remote_model:
        return RemoteTarget(options, kept)
    if shared is None or resolve(options.model) != resolve(shared.name):
        return LocalTarget(options, *load(options), DEFAULT if options.adapter else None)
    if options.adapter:
        load_adapter(resolve(options.adapter), shared.model, TARGET)
    return LocalTarget(options, shared.model, shared.tokenizer, TARGET if options.adapter else None)
