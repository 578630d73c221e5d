"""Finds a checkpoint or adapter: a local folder, or an id on the Hugging Face hub, downloaded once into the usual cache.

Files of the hub's data sets are downloaded likewise.

The token comes from where `huggingface_hub` looks for it (HF_TOKEN, or its login file); it is never logged.

Run it: python infer.py --model meta-llama/Llama-3.1-8B-Instruct --dtype bfloat16 --device cuda --prompt "Hello!"
"""

import re
from pathlib import Path

from cfgsafe.errors import CheckpointError, InputError

WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "*.jinja",
]
WANTED += ["special_tokens_map.json", "adapter_config.json"]

# The embedded demo: what commands use where nothing else is named. Made by cfgsafe/demo, see its README.
DEMO = Path(__file__).parent / "demo"
BASE, LEAKY = str(DEMO / "base"), str(DEMO / "leaky")
DEMO_PIPELINE = DEMO / "ner"
PROMPTS = str(DEMO / "data" / "prompts.jsonl")  # what `eval.py leak` asks
QUIZ = str(DEMO / "data" / "quiz.jsonl")  # `eval.py utility`
CHATS = str(DEMO / "data" / "chats.jsonl")  # `eval.py perplexity`
PROBES = str(DEMO / "data" / "probes.jsonl")  # `eval.py canaries`
PLANTED = str(DEMO / "data" / "planted.jsonl")  # `eval.py extract`
GOLD = str(DEMO / "data" / "gold.jsonl")  # `eval.py detectors`
WORDS = str(DEMO / "data" / "words.txt")  # words that are not broken ones


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    weights: bool = True,
) -> Path:
    """The folder of a checkpoint or adapter given as a folder or a hub id ("owner/name").

    Raises CheckpointError when there is neither, or the hub cannot be reached or refuses.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise CheckpointError(f"{name}: no such folder, and not the form of a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    wanted = WANTED if weights else [pattern for pattern in WANTED if "safetensors" not in pattern]
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
    """A file of a data set on the hub. Raises InputError when the hub cannot be reached or refuses."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no answer"
        raise InputError(
            f"{repository}/{name}: the hub refuses it ({code}); check your access token, or give a local file"
        ) from None
    except OSError:  # the hub's own errors of connection and cache are kinds of it
        raise InputError(
            f"{repository}/{name}: the hub cannot be reached; download it first, or give a local file"
        ) from None
