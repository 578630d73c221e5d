"""Three callers share one batch, each with its own guidance and adapter; tokens stream.

Run it: python examples/engine.py [ADAPTER_FOLDER ...]      adapters for the callers; the others have none
"""

import sys

import cfgsafe

MODEL = "cfgsafe/demo/leaky"
QUESTION = "Hi, my name is Maria Keller and I live in Lund. What is my name?"
CALLERS = {"Ann": 1.0, "Ben": 2.0, "Cleo": 3.0}  # name -> guidance


def main() -> None:
    folders = sys.argv[1:]
    names = [f"adapter-{number}" for number in range(len(folders))]
    model = cfgsafe.load_model(MODEL, adapter=dict(zip(names, folders, strict=True)))
    tokenizer = cfgsafe.load_tokenizer(MODEL)

    engine = cfgsafe.Engine(model, rows=6, slots=256)  # a guided request takes two rows
    adapters = [*names, None, None, None]  # None: the model without an adapter
    caller_of = {}
    for (caller, guidance), adapter in zip(CALLERS.items(), adapters, strict=False):
        messages = [{"role": "user", "content": QUESTION}]
        request = cfgsafe.guided_request(tokenizer, messages, guidance, adapter=adapter)
        caller_of[engine.submit(request)] = caller

    while engine.busy:
        for event in engine.step():
            caller = caller_of[event.request_id]
            if event.token is not None:
                print(f"    {caller} hears {tokenizer.decode([event.token])!r}")
            if event.completion is not None:
                print(f"{caller}'s answer: {tokenizer.decode(event.completion.tokens)}")


if __name__ == "__main__":
    main()
