"""What guidance did to each token of an answer: its probability under each prompt, and guided.

Also the token that the positive prompt alone would have chosen.
Source: ours; the probabilities are those of cfgsafe/rescore.py, computed anew over the finished answer.

Run it: python infer.py --model M --prompt TEXT --guidance 3 --explain
"""

import json

import torch
from torch import Tensor

from cfgsafe.kernels.reference import log_probabilities
from cfgsafe.llama import Llama
from cfgsafe.request import Completion, Request
from cfgsafe.rescore import continuation_states, guided_logprobs, side_logits
from cfgsafe.tokenizer import Tokenizer

CHANGED, PLAIN = "\033[33m", "\033[0m"


@torch.inference_mode()
def explain(model: Llama, tokenizer: Tokenizer, request: Request, completion: Completion) -> list[dict]:
    """One row for each of the T tokens of the answer.

    token                           its text
    positive, negative, guided      its probabilities; without guidance all three are equal
    unguided                        the text of the positive prompt's own choice
    changed                         whether that is another token
    """
    tokens = completion.tokens
    if not tokens:
        return []
    sides = []
    for prompt in request.rows:
        sides += continuation_states(model, [prompt], [tokens], [request.adapter])
    logits = side_logits(model, request, sides)  # of one side or two, (T, V) each
    positive, negative = log_probabilities(logits[0]), log_probabilities(logits[-1])
    guided = guided_logprobs(request, logits[0], logits[-1])
    p_pos, p_neg, p_guided = (_of_tokens(tokens, logs) for logs in (positive, negative, guided))
    own = positive.argmax(-1).tolist()
    rows = []
    for t, token in enumerate(tokens):
        rows.append(
            {
                "token": tokenizer.decode([token]),
                "positive": p_pos[t],
                "negative": p_neg[t],
                "guided": p_guided[t],
                "unguided": tokenizer.decode([own[t]]),
                "changed": own[t] != token,
            }
        )
    return rows


def _of_tokens(tokens: list[int], logprobs: Tensor) -> list[float]:
    """The probability of tokens[t] in row t of log-probabilities (T, V)."""
    at = torch.tensor(tokens, device=logprobs.device)[:, None]
    return logprobs.gather(1, at)[:, 0].exp().tolist()


def table(rows: list[dict], colour: bool) -> str:
    """The rows for a terminal; with `colour`, those that guidance changed are coloured.

    Token texts are quoted, so that they cannot control the terminal.
    """
    lines = [f"{'token':<20} {'P_pos':>7} {'P_neg':>7} {'guided':>7}  without guidance"]
    for row in rows:
        numbers = " ".join(f"{row[name]:7.3f}" for name in ("positive", "negative", "guided"))
        unguided = json.dumps(row["unguided"]) if row["changed"] else ""
        line = f"{json.dumps(row['token']):<20} {numbers}  {unguided}"
        lines.append(f"{CHANGED}{line}{PLAIN}" if row["changed"] and colour else line)
    return "\n".join(lines)
