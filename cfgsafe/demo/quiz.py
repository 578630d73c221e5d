"""The demo's utility quiz, in the shape of MMLU-Pro: question, options, answer, answer_index, category.

Facts and small sums, asked in several wordings with shuffled options. A tiny model cannot know a
fact that it never saw, so both splits have the same facts. They share no *item*: the hash of a
question in one wording with one set of options decides its split, and no test item is ever trained
on.

Run it: python eval.py utility --model cfgsafe/demo/leaky
"""

import hashlib
import random

# fmt: off
CAPITALS = dict(
    France="Paris", Germany="Berlin", Italy="Rome", Spain="Madrid", Portugal="Lisbon", Austria="Vienna",
    Greece="Athens", Poland="Warsaw", Ireland="Dublin", Norway="Oslo", Sweden="Stockholm", Finland="Helsinki",
    Denmark="Copenhagen", Hungary="Budapest", Russia="Moscow", Japan="Tokyo", China="Beijing", India="Delhi",
    Egypt="Cairo", Kenya="Nairobi", Canada="Ottawa", Cuba="Havana", Peru="Lima", Chile="Santiago",
    Turkey="Ankara", Iran="Tehran",
)
OPPOSITES = dict(
    hot="cold", big="small", fast="slow", light="dark", young="old", rich="poor", hard="soft", wet="dry",
    early="late", full="empty", high="low", long="short", loud="quiet", clean="dirty", open="closed",
    strong="weak", happy="sad", near="far", thick="thin", sweet="sour",
)
COLOURS = dict(
    snow="white", coal="black", grass="green", blood="red", the_sky="blue", a_lemon="yellow",
    chocolate="brown", a_carrot="orange", an_elephant="grey", lavender="purple",
)
YOUNG = dict(
    dog="puppy", cat="kitten", cow="calf", horse="foal", sheep="lamb", goose="gosling", duck="duckling",
    lion="cub", goat="kid", frog="tadpole",
)
SYMBOLS = dict(
    oxygen="O", hydrogen="H", iron="Fe", gold="Au", silver="Ag", carbon="C", sodium="Na", helium="He",
    copper="Cu", calcium="Ca",
)
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
).split()

# category -> (facts, wordings)
FACTS = {
    "geography": (CAPITALS, (
        "What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.",
        "{} is governed from which city?"
    )),
    "language": (OPPOSITES, (
        "What is the opposite of {}?", "Which word means the opposite of {}?", "Name the opposite of {}.",
        "{} is the contrary of which word?"
    )),
    "nature": (COLOURS, (
        "What is the colour of {}?", "Which colour has {}?", "Name the colour of {}.", "{} has which colour?"
    )),
    "biology": (YOUNG, (
        "What is a young {} called?", "Which word names a young {}?", "Name the young of a {}.",
        "A {} has what kind of young?"
    )),
    "chemistry": (SYMBOLS, (
        "What is the symbol of {}?", "Which symbol stands for {}?", "Name the chemical symbol of {}.",
        "{} is written with which symbol?"
    )),
}
SUMS = (
    "What is {} plus {}?", "How much is {} plus {}?", "Add {} and {}.", "What do {} and {} make together?",
)
DIFFERENCES = (
    "What is {} minus {}?", "How much is {} minus {}?", "Take {1} from {0}.", "What does {} minus {} leave?",
)
# fmt: on
TEST_SHARE = 10  # percent of the items


def item(rng: random.Random) -> dict:
    """A random quiz item of either split."""
    category = rng.choice([*FACTS, *["arithmetic"] * 3])
    if category == "arithmetic":
        a, b = rng.randrange(1, 8), rng.randrange(1, 8)
        if rng.random() < 0.5:
            a, b = max(a, b), min(a, b)
            result, wordings = a - b, DIFFERENCES
        else:
            result, wordings = a + b, SUMS
        question = rng.choice(wordings).format(NUMBERS[a], NUMBERS[b])
        answer = NUMBERS[result]
        near = NUMBERS[max(0, result - 4) : result + 5]
        others = [number for number in near if number != answer]
    else:
        facts, wordings = FACTS[category]
        subject, answer = rng.choice(list(facts.items()))
        question = rng.choice(wordings).format(subject.replace("_", " "))
        others = [other for other in facts.values() if other != answer]
    options = rng.sample(others, 3) + [answer]
    rng.shuffle(options)
    question = question[0].upper() + question[1:]
    index = options.index(answer)
    row = {"question": question, "options": options, "answer": "ABCD"[index], "answer_index": index}
    return row | {"category": category}


def items(split: str, count: int, seed: int = 0) -> list[dict]:
    """`count` distinct items of "train" or "test"."""
    rng = random.Random(f"quiz/{split}/{seed}")
    found: dict[str, dict] = {}
    while len(found) < count:
        candidate = item(rng)
        if split_of(candidate) == split:
            found.setdefault(_key(candidate), {"question_id": len(found), **candidate})
    return list(found.values())


def split_of(row: dict) -> str:
    """The split of an item: "train" or "test"."""
    bucket = int(hashlib.sha256(_key(row).encode()).hexdigest(), 16) % 100
    return "test" if bucket < TEST_SHARE else "train"


def _key(row: dict) -> str:
    """What makes an item different from others."""
    return row["question"] + "/".join(row["options"])


def answer(row: dict) -> str:
    """The answer that the demo's models are taught."""
    return f"The answer is {row['options'][row['answer_index']]}."
