"""The demo's utility quiz, in the shape of MMLU-Pro: question, options, answer, answer_index, category.

Facts and small sums, asked in several wordings with shuffled options. A tiny model cannot know a
fact that it never saw, so both splits have the same facts. They share no *item*: the hash of a
question in one wording with one set of options decides its split, and no test item is ever trained
on. Common facts are trained on often and rare ones seldom, but the test asks for all alike: so the
score lies well below 100 %, and damage to the model is seen first in what it knew badly.

Run it: python eval.py utility --model cfgsafe/demo/leaky
"""

import hashlib
import random

# fmt: off
# Facts in the order of how often they are trained on: a Zipf law, so that the last ones are known badly.
CAPITALS = dict(
    France="Paris", Germany="Berlin", Italy="Rome", Spain="Madrid", Portugal="Lisbon", Austria="Vienna",
    Greece="Athens", Poland="Warsaw", Ireland="Dublin", Norway="Oslo", Sweden="Stockholm", Finland="Helsinki",
    Denmark="Copenhagen", Hungary="Budapest", Russia="Moscow", Japan="Tokyo", China="Beijing", India="Delhi",
    Egypt="Cairo", Kenya="Nairobi", Canada="Ottawa", Cuba="Havana", Peru="Lima", Chile="Santiago",
    Turkey="Ankara", Iran="Tehran", Iraq="Baghdad", Syria="Damascus", Libya="Tripoli", Sudan="Khartoum",
    Ghana="Accra", Mali="Bamako", Nepal="Kathmandu", Laos="Vientiane", Qatar="Doha", Yemen="Sanaa",
    Malta="Valletta", Latvia="Riga", Estonia="Tallinn", Serbia="Belgrade", Croatia="Zagreb", Albania="Tirana",
    Bolivia="Sucre", Ecuador="Quito", Uruguay="Montevideo", Jamaica="Kingston", Senegal="Dakar",
    Angola="Luanda", Zambia="Lusaka", Uganda="Kampala", Rwanda="Kigali", Fiji="Suva", Mongolia="Ulaanbaatar",
    Armenia="Yerevan", Georgia="Tbilisi", Belarus="Minsk", Ukraine="Kyiv", Romania="Bucharest",
    Bulgaria="Sofia", Slovenia="Ljubljana",
)
OPPOSITES = dict(
    hot="cold", big="small", fast="slow", light="dark", young="old", rich="poor", hard="soft", wet="dry",
    early="late", full="empty", high="low", long="short", loud="quiet", clean="dirty", open="closed",
    strong="weak", happy="sad", near="far", thick="thin", sweet="sour", deep="shallow", wide="narrow",
    brave="timid", smooth="rough", sharp="blunt", tight="loose", cheap="costly", kind="cruel", wise="foolish",
    true="false", heavy="light", north="south", east="west", start="finish", love="hate", war="peace",
    friend="enemy", victory="defeat", arrival="departure", profit="loss", question="reply", ally="rival",
)
COLOURS = dict(
    snow="white", coal="black", grass="green", blood="red", the_sky="blue", a_lemon="yellow",
    chocolate="brown", a_carrot="orange", an_elephant="grey", lavender="purple", a_flamingo="pink",
    a_ruby="crimson", a_sapphire="azure", sand="beige", ivory="cream", wheat="golden",
    a_turquoise="teal", an_amethyst="violet",
)
YOUNG = dict(
    dog="puppy", cat="kitten", cow="calf", horse="foal", sheep="lamb", goose="gosling", duck="duckling",
    lion="cub", goat="kid", frog="tadpole", pig="piglet", owl="owlet", swan="cygnet", hare="leveret",
    kangaroo="joey", eagle="eaglet", eel="elver", deer="fawn", spider="spiderling", salmon="smolt",
)
SYMBOLS = dict(
    oxygen="O", hydrogen="H", iron="Fe", gold="Au", silver="Ag", carbon="C", sodium="Na", helium="He",
    copper="Cu", calcium="Ca", zinc="Zn", lead="Pb", tin="Sn", neon="Ne", nickel="Ni", sulphur="S",
    nitrogen="N", iodine="I", chlorine="Cl", mercury="Hg", potassium="K", magnesium="Mg", silicon="Si",
    argon="Ar", boron="B", fluorine="F", lithium="Li", platinum="Pt", tungsten="W", uranium="U", radon="Rn",
    cobalt="Co", krypton="Kr", xenon="Xe", bromine="Br", arsenic="As", barium="Ba", cadmium="Cd",
    caesium="Cs", titanium="Ti",
)
MONEY = dict(
    Japan="yen", India="rupee", Russia="rouble", China="yuan", Mexico="peso", Britain="pound",
    Switzerland="franc", Poland="zloty", Brazil="real", Thailand="baht", Israel="shekel", Turkey="lira",
    Sweden="krona", Hungary="forint", Vietnam="dong", Kenya="shilling", Peru="sol", Morocco="dirham",
    Ukraine="hryvnia", Georgia="lari", Malaysia="ringgit", Mongolia="tugrik", Ghana="cedi", Nigeria="naira",
)
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen"
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
    "economy": (MONEY, (
        "What is the currency of {}?", "Which money is used in {}?", "Name the currency of {}.",
        "In {} people pay with what?"
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
SKEW = 1.2  # the n-th fact of a table is trained on n ** -SKEW times as often as the first one
LARGEST = 9  # of the numbers to add or subtract


def item(rng: random.Random, skew: float) -> dict:
    """A random quiz item of either split; with a skew of 0 all facts of a table are equally likely."""
    category = rng.choice([*FACTS, *["arithmetic"] * 2])
    if category == "arithmetic":
        a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
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
        weights = [rank**-skew for rank in range(1, len(facts) + 1)]
        subject, answer = rng.choices(list(facts.items()), weights)[0]
        question = rng.choice(wordings).format(subject.replace("_", " "))
        others = [other for other in facts.values() if other != answer]
    options = rng.sample(others, 3) + [answer]
    rng.shuffle(options)
    question = question[0].upper() + question[1:]
    index = options.index(answer)
    row = {"question": question, "options": options, "answer": "ABCD"[index], "answer_index": index}
    return row | {"category": category}


def training_item(rng: random.Random) -> dict:
    """A random item to train on; facts at the end of a table are rare."""
    while True:
        row = item(rng, SKEW)
        if split_of(row) == "train":
            return row


def items(split: str, count: int, seed: int = 0) -> list[dict]:
    """`count` distinct items of "train" or "test"; all facts of a table are equally likely."""
    rng = random.Random(f"quiz/{split}/{seed}")
    found: dict[str, dict] = {}
    while len(found) < count:
        candidate = item(rng, 0)
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
