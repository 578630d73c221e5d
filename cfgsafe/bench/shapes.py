"""The shapes that the benchmarks run, and models of random weights in these shapes.

Run it: python -m cfgsafe.bench decode --shape 221m
"""

import torch

from cfgsafe.llama import Llama, LlamaConfig, rope_frequencies


def llama_8b() -> LlamaConfig:
    """The shape of Llama-3.1-8B."""
    return LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072)


TINY = LlamaConfig(4096, 64, 128, 2, 4, 2, 16, 8192)
# Decoding reads many weights for each token, and training computes many logits for each token, so
# their small shapes differ. The fields: V, C, intermediate, layers, H, K, D, context.
DECODE_SHAPES = {
    "tiny": TINY,
    "224m": LlamaConfig(128256, 768, 2048, 20, 12, 4, 64, 8192, tie_word_embeddings=True),
    "221m": LlamaConfig(128256, 1024, 2816, 8, 16, 4, 64, 8192, tie_word_embeddings=True),
    "smollm2-135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, tie_word_embeddings=True),
    "llama-3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 2**17, tie_word_embeddings=True),
    "8b": llama_8b(),
}
ORPO_SHAPES = {"tiny": TINY, "small": LlamaConfig(128256, 512, 1408, 8, 8, 8, 64, 8192), "8b": llama_8b()}


def base_parameters(config: LlamaConfig) -> int:
    """Number of weights of the base, counted on a model without storage."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())


def random_model(config: LlamaConfig, dtype: torch.dtype, device: str) -> Llama:
    """A model of random weights, made on `device`."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(dtype).to_empty(device=device)
    model.frequencies = rope_frequencies(config).to(device)  # to_empty left it undefined
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    return model.requires_grad_(False).eval()
