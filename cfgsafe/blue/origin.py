"""What an adapter's training taught it: its stage writes it down, `train.py merge` warns of it.

Half of the pairs of a CFG-aware training set teach to share personal data, under the negative
sentence. What such an adapter does without the positive one is not what it was made for. An adapter of
`train.py distil` is guarded under the one prompt that it was distilled for.

Run it: python train.py merge --help
"""

from pathlib import Path

from cfgsafe.blue.options import Options
from cfgsafe.blue.resume import CONFIG
from cfgsafe.files import read_json, read_jsonl
from cfgsafe.hub import resolve
from cfgsafe.subject import NEGATIVE, POSITIVE

CFG_AWARE = "cfg_aware"  # its key in the config.json of a training run, beside the adapters' folders
STUDENT = "student"  # the same, of a run of train.py distil: the prompt that it was distilled for


def record(options: Options) -> dict[str, bool | None]:
    """What a run writes down: whether its pairs or --init-adapter are CFG-aware; None if nobody knows."""
    inherited = is_cfg_aware(options.init_adapter) if options.init_adapter else False
    return {CFG_AWARE: teaches_both(options.pairs) or inherited}


def teaches_both(pairs: str) -> bool:
    """Whether the prompts of a file of pairs hold both sentences of guidance.

    Raises InputError naming the line.
    """
    missing = {POSITIVE, NEGATIVE}
    for _, row in read_jsonl(pairs):
        missing = {sentence for sentence in missing if sentence not in str(row.get("prompt"))}
        if not missing:
            return True
    return False


def is_cfg_aware(adapter: str) -> bool | None:
    """What the training run beside an adapter's folder recorded; None if nothing.

    Raises CheckpointError or InputError if adapter or record cannot be read.
    """
    recorded = _recorded(adapter).get(CFG_AWARE)
    return recorded if isinstance(recorded, bool) else None


def distilled_for(adapter: str) -> str | None:
    """The sentence that a distilled adapter needs in the system prompt, "" for none; None if not distilled.

    Raises what `is_cfg_aware` raises.
    """
    recorded = _recorded(adapter)
    if STUDENT not in recorded:
        return None
    return "" if recorded[STUDENT] == "none" else str(recorded.get("positive"))


def _recorded(adapter: str) -> dict:
    path = Path(resolve(adapter)).parent / CONFIG
    return read_json(path) if path.exists() else {}
