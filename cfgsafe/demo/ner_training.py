"""Trains the demo's NER, a small spaCy pipeline, on the generator's training people.

Hash embeddings of norm, prefix, suffix and shape, a convolutional encoder (width 64, depth 3) and
spaCy's transition-based parser. It learns from the messages of generated dialogues with their gold
spans, from leaking and from clean answers.

Run it: python train.py demo-models --help      (it is the last stage)
"""

import random
from pathlib import Path

from cfgsafe.demo import famous
from cfgsafe.demo.corpus import people
from cfgsafe.demo.dialogues import Writer
from cfgsafe.demo.held_out import HELD_OUT
from cfgsafe.demo.templates import EASY, HARD, TRAIN
from cfgsafe.progress import progress

DIALOGUES = 2500
EPOCHS = 4
WIDTH = 64
TOK2VEC = {
    "@architectures": "spacy.Tok2Vec.v2",
    "embed": {
        "@architectures": "spacy.MultiHashEmbed.v2",
        "width": WIDTH,
        "attrs": ["NORM", "PREFIX", "SUFFIX", "SHAPE"],
        "rows": [2000, 500, 1000, 500],
        "include_static_vectors": False,
    },
    "encode": {
        "@architectures": "spacy.MaxoutWindowEncoder.v2",
        "width": WIDTH,
        "depth": 3,
        "window_size": 1,
        "maxout_pieces": 3,
    },
}
NER = {
    "@architectures": "spacy.TransitionBasedParser.v2",
    "state_type": "ner",
    "extra_state_tokens": False,
    "hidden_width": WIDTH,
    "maxout_pieces": 2,
    "use_upper": True,
    "tok2vec": TOK2VEC,
}


def labelled_texts(pool: str, count: int, seed: int) -> list[tuple[str, list[tuple[int, int, str]]]]:
    """(text, gold spans) of every message of `count` dialogues, and the clean form of each answer.

    The pool "train" speaks in the sentences of training and knows famous people; others in held-out ones.
    """
    writer = Writer(f"ner/{pool}/{seed}", TRAIN if pool == "train" else HELD_OUT)
    source = people(pool, seed)
    texts: dict[str, list[tuple[int, int, str]]] = {}
    for number in range(count):
        kind = (*EASY, *HARD, "lookup")[number % 10]
        for turn in writer.dialogue(source.person(), kind).turns:
            texts[turn.text()] = turn.spans()
            if turn.role == "assistant":
                texts[turn.text(leak=False)] = []
    for _ in range(count // 5):
        for turn in writer.clean_chat():
            texts[turn.text()] = []
    if pool == "train":
        texts |= famous_texts()
    return list(texts.items())


def famous_texts() -> dict[str, list[tuple[int, int, str]]]:
    """Question or answer about a famous person or place -> its spans: public names are entities as well."""
    texts: dict[str, list[tuple[int, int, str]]] = {}
    for subject in famous.SUBJECTS:
        for thing, name in subject.facts.items():
            for wording in subject.questions:
                question, answer = famous.fact(subject, thing, wording)
                texts[question] = []
                start = answer.index(name)
                texts[answer] = [(start, start + len(name), subject.label)]
    return texts


def train(folder: Path, seed: int) -> None:
    """Train and write the pipeline."""
    import spacy
    from spacy.training import Example
    from spacy.util import fix_random_seed, minibatch

    fix_random_seed(seed)
    rng = random.Random(seed)
    nlp = spacy.blank("en")
    nlp.add_pipe("ner", config={"model": NER})
    examples = []
    for text, spans in labelled_texts("train", DIALOGUES, seed):
        examples.append(Example.from_dict(nlp.make_doc(text), {"entities": spans}))
    optimiser = nlp.initialize(lambda: examples[:2000])
    for epoch in range(EPOCHS):
        rng.shuffle(examples)
        for batch in minibatch(progress(examples, desc=f"ner epoch {epoch + 1}/{EPOCHS}"), 64):
            nlp.update(batch, sgd=optimiser, drop=0.1)
    with nlp.use_params(optimiser.averages):
        nlp.to_disk(folder)
