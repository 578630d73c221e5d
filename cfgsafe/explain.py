"""What guidance did to each token of an answer: its probability under either prompt, guided, and what would have been said without.

Source: ours; the probabilities are those of kernels.reference.guide, computed anew over the finished answer in one forward a side.

Run it: python infer.py --model M --prompt TEXT --guidance 3 --explain
"""

import json

import torch

from cfgsafe.decode import Completion, Request
from cfgsafe.kernels.reference import guide, log_probabilities
from cfgsafe.llama import Llama
from cfgsafe.lora import set_adapters
from cfgsafe.tokenizer import Tokenizer

CHANGED, PLAIN = "\033[33m", "\033[0m"


@torch.inference_mode()
def explain(model: Llama, tokenizer: Tokenizer, request: Request, completion: Completion) -> list[dict]:
    """For each token of the answer: `token` (its text), `positive`, `negative`, `guided` (its probabilities), `unguided` (the text of the
    positive prompt's own choice) and `changed` (whether that is another). Without guidance the three probabilities are one."""
    tokens = completion.tokens
    if not tokens:
        return []
    sides = []
    set_adapters(model, [request.adapter])
    for prompt in request.rows:
        hidden = model(torch.tensor([prompt + tokens[:-1]], device=model.device))[0, len(prompt) - 1 :]
        sides.append(model.head(hidden))
    set_adapters(model, None)
    full = lambda value: torch.full((len(tokens),), value, device=model.device)
    logs = guide(
        sides[0], sides[-1], full(request.guidance), full(request.space == "log"), full(request.alpha)
    )
    at = torch.tensor(tokens, device=model.device)[:, None]
    of_token = lambda table: table.gather(1, at)[:, 0].exp().tolist()
    columns = [of_token(log_probabilities(side)) for side in (sides[0], sides[-1])] + [of_token(logs)]
    own = log_probabilities(sides[0]).argmax(-1).tolist()
    names = ("positive", "negative", "guided")
    return [
        {
            "token": tokenizer.decode([token]),
            **dict(zip(names, values, strict=True)),
            "unguided": tokenizer.decode([mine]),
            "changed": mine != token,
        }
        for token, mine, *values in zip(tokens, own, *columns, strict=True)
    ]


def table(rows: list[dict], colour: bool) -> str:
    """The rows for a terminal, those that guidance changed in colour; token texts are quoted, so that they cannot steer it."""
    lines = [f"{'token':<20} {'P_pos':>7} {'P_neg':>7} {'guided':>7}  without guidance"]
    for row in rows:
        numbers = " ".join(f"{row[name]:7.3f}" for name in ("positive", "negative", "guided"))
        line = f"{json.dumps(row['token']):<20} {numbers}  {json.dumps(row['unguided']) if row['changed'] else ''}"
        lines.append(f"{CHANGED}{line}{PLAIN}" if row["changed"] and colour else line)
    return "\n".join(lines)
