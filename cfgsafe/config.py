"""The configuration of a Llama: `config.json` and `generation_config.json`, each field in its range.

Source: `LlamaConfig` of Hugging Face transformers, whose defaults hold where a field is absent or null.
Deviation: what we do not compute as the field asks is refused, not ignored.

Run it: python -m pytest tests/test_config.py
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from cfgsafe.errors import CheckpointError
from cfgsafe.settings import (
    FLAG,
    OBJECT,
    Kind,
    above_zero,
    check_fields,
    either,
    integer,
    list_of,
    number,
    one_of,
    read_settings,
)

OLD_ROPE_THETA, OLD_EPS = 10000.0, 1e-6  # of Llama 1 and 2, whose config.json may leave them out
LONGEST_CONTEXT = 2**31 - 1
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What config.json may hold. Sizes are then compared with the weights; the bounds keep their products small.
KINDS = {
    "model_type": one_of("llama"),
    "hidden_act": one_of("silu"),
    "vocab_size": integer(1, 2**24),
    "hidden_size": integer(1, 2**20),
    "intermediate_size": integer(1, 2**22),
    "num_hidden_layers": integer(1, 10_000),
    "num_attention_heads": integer(1, 2**14),
    "num_key_value_heads": integer(1, 2**14),
    "head_dim": integer(2, 2**14),
    "max_position_embeddings": integer(1, LONGEST_CONTEXT),
    "rms_norm_eps": above_zero(1),
    "rope_theta": number(1, 1e15),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
}
SCALING = {  # type of RoPE scaling -> its fields
    "llama3": {
        "factor": above_zero(1e6),
        "low_freq_factor": above_zero(1e6),
        "high_freq_factor": above_zero(1e6),
        "original_max_position_embeddings": integer(1, LONGEST_CONTEXT),
    },
    "linear": {"factor": above_zero(1e6)},
    "default": {},
}


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face `LlamaConfig` that we read.

    Two configs are equal when the weights of one fit the other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = field(compare=False)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None  # {"rope_type": ..., and the fields in SCALING}
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = field(default=None, compare=False)
    eos_token_id: int | list[int] | None = field(default=None, compare=False)
    extra: dict = field(default_factory=dict, compare=False)  # config.json's other keys

    @staticmethod
    def from_dict(raw: dict, place: str | Path = "config.json") -> "LlamaConfig":
        """Read a `config.json`, with either spelling of RoPE (`rope_scaling` or `rope_parameters`).

        Fields that are null are as if they were absent. Raises CheckpointError naming the field.
        """
        raw = {name: value for name, value in raw.items() if value is not None}
        check_fields(raw, KINDS, place, NEEDED)
        if "quantization_config" in raw:
            raise CheckpointError(f"{place}: quantization_config: quantised checkpoints are not supported")
        ids = token_ids(raw["vocab_size"])
        check_fields(raw, {"bos_token_id": one_id(raw["vocab_size"]), "eos_token_id": ids}, place)
        rope = raw.pop("rope_parameters", None)
        if rope:
            raw["rope_theta"] = rope.get("rope_theta", OLD_ROPE_THETA)
            raw["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
            check_fields(raw, {"rope_theta": KINDS["rope_theta"]}, f"{place}: rope_parameters")
        raw["rope_scaling"] = _read_scaling(raw.get("rope_scaling"), f"{place}: rope_scaling")
        raw.setdefault("rope_theta", OLD_ROPE_THETA)
        raw.setdefault("rms_norm_eps", OLD_EPS)
        raw.setdefault("max_position_embeddings", 2048)
        heads = raw["num_attention_heads"]
        raw.setdefault("num_key_value_heads", heads)
        raw.setdefault("head_dim", raw["hidden_size"] // heads)
        if raw["head_dim"] < 2 or raw["head_dim"] % 2 or heads % raw["num_key_value_heads"]:
            raise CheckpointError(
                f"{place}: head_dim must be even and num_attention_heads a multiple of num_key_value_heads"
            )
        names = {field_.name for field_ in fields(LlamaConfig)} - {"extra"}
        known = {key: value for key, value in raw.items() if key in names}
        extra = {key: value for key, value in raw.items() if key not in names}
        return LlamaConfig(**known, extra=extra)

    def to_dict(self) -> dict:
        """The `config.json` that `transformers` and we read back."""
        own = asdict(self)
        extra = own.pop("extra")
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        return {**kind, **extra, **own}

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token id that ends an answer."""
        if self.eos_token_id is None:
            return frozenset()
        if isinstance(self.eos_token_id, int):
            return frozenset([self.eos_token_id])
        return frozenset(self.eos_token_id)


def read_config(folder: str | Path) -> LlamaConfig:
    """The configuration of a checkpoint's model. Raises CheckpointError.

    If `generation_config.json` names end tokens, they replace those of `config.json`: there may be more.
    """
    path = Path(folder) / "config.json"
    config = LlamaConfig.from_dict(read_settings(path, {}), path)
    path = path.with_name("generation_config.json")
    if path.exists():
        kinds = {"eos_token_id": token_ids(config.vocab_size)}
        ends = read_settings(path, kinds).get("eos_token_id", config.eos_token_id)
        config = replace(config, eos_token_id=ends)
    return config


def one_id(vocab_size: int) -> Kind:
    """A token id of a vocabulary."""
    return integer(0, vocab_size - 1)


def token_ids(vocab_size: int) -> Kind:
    """One token id of a vocabulary, or a list of them."""
    return either(one_id(vocab_size), list_of(one_id(vocab_size)))


def _read_scaling(scaling: dict | None, place: str) -> dict | None:
    """The `rope_scaling` of a config.json; None when it asks for no scaling.

    Raises CheckpointError naming the type or the field.
    """
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    check_fields({"rope_type": kind}, {"rope_type": one_of(*SCALING)}, place)
    if kind == "default":
        return None
    check_fields(scaling, SCALING[kind], place, needed=tuple(SCALING[kind]))
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise CheckpointError(f"{place}: low_freq_factor must be below high_freq_factor")
    return {**scaling, "rope_type": kind}
