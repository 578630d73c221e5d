"""Finds checkpoints, adapters and data sets: in a local folder, or on the Hugging Face hub.

Source: `huggingface_hub`, which downloads once, into its cache, and looks for the access token in
HF_TOKEN or its login file. The token is never logged. The paths of the embedded demo are here too.

Run it: python infer.py --model meta-llama/Llama-3.1-8B-Instruct --device cuda --prompt "Hello!"
"""

import os
import re
from pathlib import Path

from cfgsafe.errors import CheckpointError, InputError

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
OTHERS = [
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "*.jinja",
    "special_tokens_map.json",
    "adapter_config.json",
]

# The embedded demo, made by cfgsafe/demo: what commands use by default.
DEMO = Path(__file__).parent / "demo"
BASE, LEAKY = str(DEMO / "base"), str(DEMO / "leaky")
DEMO_PIPELINE = DEMO / "ner"
PROMPTS = str(DEMO / "data" / "prompts.jsonl")  # for `eval.py leak`
QUIZ = str(DEMO / "data" / "quiz.jsonl")  # for `eval.py utility`
CHATS = str(DEMO / "data" / "chats.jsonl")  # for `eval.py perplexity`
PROBES = str(DEMO / "data" / "probes.jsonl")  # for `eval.py canaries`
PLANTED = str(DEMO / "data" / "planted.jsonl")  # for `eval.py extract`
GOLD = str(DEMO / "data" / "gold.jsonl")  # for `eval.py detectors`
WORDS = str(DEMO / "data" / "words.txt")  # the vocabulary: words that are not broken


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    weights: bool = True,
) -> Path:
    """The local folder of a checkpoint or adapter, given as a folder or a hub id ("owner/name").

    Without `weights`, no safetensors are downloaded. Raises CheckpointError when there is neither a
    folder nor such a hub id, or the hub refuses it or cannot be reached.
    """
    if os.path.isdir(name):  # also tells of names that are too long for a path, where Path.is_dir fails
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise CheckpointError(f"{name}: no such folder, and not the form of a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    wanted = WEIGHTS + OTHERS if weights else OTHERS
    try:
        return Path(
            snapshot_download(str(name), revision=revision, cache_dir=cache_dir, allow_patterns=wanted)
        )
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no answer"
        raise CheckpointError(
            f"{name}: no such folder, and the hub refuses it ({code}); check the name and your access token"
        ) from None
    except HFValidationError:
        raise CheckpointError(f"{name}: no such folder, and not the form of a hub id (owner/name)") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        raise CheckpointError(
            f"{name}: no such folder, and the hub cannot be reached; download it first"
        ) from None


def dataset_file(repository: str, name: str) -> Path:
    """A file of a data set on the hub. Raises InputError when the hub refuses it or cannot be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no answer"
        raise InputError(
            f"{repository}/{name}: the hub refuses it ({code}); check your access token, or give a local file"
        ) from None
    except OSError:  # the hub's own errors of connection and cache are subclasses
        raise InputError(
            f"{repository}/{name}: the hub cannot be reached; download it first, or give a local file"
        ) from None
