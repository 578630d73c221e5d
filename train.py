"""Everything that trains or makes training data.

    python train.py demo            unlearn, guard and measure the embedded model: 5 min on 2 CPU cores
    python train.py study           any Llama made leaky, guarded and measured: what is forgotten, how deep
    python train.py pairs           preference pairs from dialogues
    python train.py ordinary        conversations in a model's own words, for a guard to keep
    python train.py orpo            LoRA adapter by ORPO on pairs
    python train.py distil          an adapter whose single row gives the distribution of a guided pair
    python train.py subtract        base - scale * (tuned - base)
    python train.py merge           a checkpoint with an adapter merged into it
    python train.py quantise        a checkpoint rounded to what 8 or 4 bits hold
    python train.py relearn         how fast a few rows bring forgotten facts back
    python train.py attacker        the red team's attacker: SFT, GFlowNet, smoothing, adaptation
    python train.py safety          refusals of the attacks that succeeded
    python train.py redteam-demo    attack the embedded models, train on the successes, attack again: 10 min
    python train.py dialogues       the demo's generated dialogues, test prompts and red-team contexts
    python train.py demo-models     rebuild the embedded models and NER

`python train.py STAGE --help` lists a stage's options.
"""

from cfgsafe.blue import distil, merge, ordinary, orpo, pairs, quantise, relearn, subtract
from cfgsafe.cli import Commands, run_subcommand
from cfgsafe.demo import experiment, pretrain, redteam, testset
from cfgsafe.red import safety, stages
from cfgsafe.study import options as study_options
from cfgsafe.study import study

STAGES: Commands = {
    "demo": (experiment.Options, experiment.run),
    "study": (study_options.Options, study.run),
    "pairs": (pairs.Options, pairs.run),
    "ordinary": (ordinary.Options, ordinary.run),
    "orpo": (orpo.Options, orpo.run),
    "distil": (distil.Options, distil.run),
    "subtract": (subtract.Options, subtract.run),
    "merge": (merge.Options, merge.run),
    "quantise": (quantise.Options, quantise.run),
    "relearn": (relearn.Options, relearn.run),
    "attacker": (stages.Options, stages.run),
    "safety": (safety.Options, safety.run),
    "redteam-demo": (redteam.Options, redteam.run),
    "dialogues": (testset.Options, testset.run),
    "demo-models": (pretrain.Options, pretrain.run),
}


def main() -> None:
    run_subcommand(STAGES, __doc__)


if __name__ == "__main__":
    main()
