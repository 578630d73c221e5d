"""Unlearn, guard and red-team a Llama-3.1 model in plain PyTorch.

    model = cfgsafe.load_model("cfgsafe/demo/leaky")
    tokenizer = cfgsafe.load_tokenizer("cfgsafe/demo/leaky")
    request = cfgsafe.guided_request(tokenizer, [{"role": "user", "content": "Hi!"}], guidance=3.0)
    completion = cfgsafe.generate(model, [request])[0]
    print(tokenizer.decode(completion.tokens))

These names are the public surface; everything else may change. `examples/engine.py` shows them at
work.
"""

from cfgsafe.decode import Engine, generate
from cfgsafe.errors import CfgsafeError, CheckpointError, ContextError, InputError
from cfgsafe.load import load_model, load_tokenizer
from cfgsafe.request import Request, guided_request

__all__ = [
    "CfgsafeError",
    "CheckpointError",
    "ContextError",
    "Engine",
    "InputError",
    "Request",
    "generate",
    "guided_request",
    "load_model",
    "load_tokenizer",
]
