"""Everything that measures. A command that runs a model prints one JSON line on stdout at its end.

    python eval.py leak             personal data in a model's answers
    python eval.py utility          answers to multiple-choice questions
    python eval.py perplexity       held-out text under the model
    python eval.py extract          attacks that ask for the items masked in scrubbed dialogues
    python eval.py canaries         are persons of the training data more likely than invented twins?
    python eval.py memorised        what a model has kept of the facts that it was trained on
    python eval.py attack           success and diversity of attackers against a target
    python eval.py sweep            leaks, utility and broken words over guidance, with a figure
    python eval.py table            the paper's tables from the results of runs and sweeps
    python eval.py report           a run as one HTML file, personal data masked
    python eval.py detectors        precision and recall of what finds personal data
    python eval.py demo-models      whether the embedded models reach their required scores

`python eval.py COMMAND --help` lists a command's options.
"""

from cfgsafe.cli import Commands, run_subcommand
from cfgsafe.demo import exam
from cfgsafe.measure import canaries, detectors, extract, leak, memorised, perplexity, utility
from cfgsafe.red import evaluate
from cfgsafe.report import html, sweep, tables

COMMANDS: Commands = {
    "leak": (leak.Options, leak.run),
    "utility": (utility.Options, utility.run),
    "perplexity": (perplexity.Options, perplexity.run),
    "extract": (extract.Options, extract.run),
    "canaries": (canaries.Options, canaries.run),
    "memorised": (memorised.Options, memorised.run),
    "attack": (evaluate.Options, evaluate.run),
    "sweep": (sweep.Options, sweep.run),
    "table": (tables.Options, tables.run),
    "report": (html.Options, html.run),
    "detectors": (detectors.Options, detectors.run),
    "demo-models": (exam.Options, exam.run),
}


def main() -> None:
    run_subcommand(COMMANDS, __doc__)


if __name__ == "__main__":
    main()
