"""An endless text in a small English of our own, which can only be predicted by looking back.

Every document is one paragraph. Its first sentence sets the tense; the next ones say who owns what and lives where;
the rest are scenes that refer to those facts, count, quote, close brackets or inflect verbs across clauses. A model of
this text needs attention heads to carry names, numbers, tenses and phrases, and channels to remember the words.
"""

from random import Random
from typing import NamedTuple

WOMEN = ("Mira", "Anna", "Vera", "Lena", "Nora", "Ida", "Rosa", "Tilda", "Greta", "Paula")
MEN = ("Tomas", "Otto", "Felix", "Jonas", "Emil", "Viktor", "Hugo", "Leo", "Marek", "Pavel")
COLOURS = ("red", "green", "blue", "white", "black", "grey", "brown", "yellow")
THINGS = ("kite", "boat", "lamp", "drum", "clock", "map", "coat", "ladder", "basket", "bell", "mirror", "ring")
PLACES = ("bridge", "harbour", "mill", "market", "river", "tower", "garden", "forest", "station", "castle")
CREATURES = ("painter", "sailor", "baker", "teacher", "bird", "dog", "child", "woman", "mouse", "goose", "king", "cat")
PLURALS = {"child": "children", "woman": "women", "mouse": "mice", "goose": "geese"}
MOODS = ("old", "young", "tired", "happy", "quiet", "proud")
ACTIONS = (("sing", "sang"), ("wait", "waited"), ("dance", "danced"), ("sleep", "slept"), ("work", "worked"))
CONTACTS = (("see", "saw"), ("follow", "followed"), ("help", "helped"), ("know", "knew"), ("call", "called"))
SYLLABLES = ("ba", "di", "fo", "gu", "ka", "lo", "mi", "nu", "pe", "ro", "su", "ta", "vo", "ze")
CONTAINERS = (("box", "(", ")"), ("bag", "[", "]"), ("tin", "{", "}"), ("jar", "<", ">"))
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Person(NamedTuple):
    """Somebody of a document, with the facts that its later sentences refer back to."""

    name: str
    amount: str
    colour: str
    thing: str
    home: str

    @property
    def many(self) -> bool:
        """Whether this person owns several things, not one."""
        return self.amount != NUMBERS[0]

    @property
    def goods(self) -> str:
        """What this person owns, in its number: "kite", "kites"."""
        return inflect(self.thing, self.many)


def inflect(noun: str, many: bool) -> str:
    """The noun in the singular or the plural."""
    return PLURALS.get(noun, noun + "s") if many else noun


class Document:
    """One paragraph: a day, its people, and scenes in each of which one of them acts."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.past = rng.random() < 0.5
        facts = zip(*(rng.sample(words, 3) for words in (WOMEN + MEN, COLOURS, THINGS, PLACES)), strict=True)
        self.people = [Person(name, rng.choice(NUMBERS[:4]), *rest) for name, *rest in facts]

    def text(self) -> str:
        """The paragraph: the day, the facts, then the scenes, some of them more than once."""
        scenes = (self.recall, self.recall, self.walk, self.tally, self.recite, self.quote, self.pack, self.agree)
        told = [scene(self.rng.choice(self.people)) for scene in self.rng.choices(scenes, k=self.rng.randint(4, 7))]
        own, live = self.verb("own", "owned"), self.verb("live", "lived")
        facts = [f"{p.name} {own} {p.amount} {p.colour} {p.goods} and {live} by the {p.home}." for p in self.people]
        return " ".join([f"It {self.be(False)} {self.rng.choice(DAYS)}.", *facts, *told])

    def be(self, many: bool) -> str:
        """The verb "to be" in the tense of the document."""
        return (("is", "are"), ("was", "were"))[self.past][many]

    def verb(self, base: str, past: str, many: bool = False) -> str:
        """A verb in the tense of the document; only the present agrees in number."""
        return past if self.past else base + "s" * (not many)

    def recall(self, p: Person) -> str:
        """A sentence that only the facts can complete."""
        sentences = (
            f"{p.name} {self.verb('own', 'owned')} {p.amount} {p.goods}.",
            f"{p.name}'s {p.goods} {self.be(p.many)} {p.colour}.",
            f"The {p.colour} {p.goods} {self.verb('belong', 'belonged', p.many)} to {p.name}.",
            f"Who {self.verb('live', 'lived')} by the {p.home}? {p.name}.",
        )
        return self.rng.choice(sentences)

    def walk(self, p: Person) -> str:
        """A walk in which pronouns stand for a person and for what that person owns."""
        he, his = ("she", "her") if p.name in WOMEN else ("he", "his")
        out = f"{p.name} {self.verb('take', 'took')} {his} {p.colour} {p.goods} to the {self.rng.choice(PLACES)}"
        state = f"where {'they' if p.many else 'it'} {self.be(p.many)} {self.rng.choice(('lost', 'safe'))}"
        return f"{out}, {state}, and then {he} {self.verb('walk', 'walked')} home to the {p.home}."

    def tally(self, p: Person) -> str:
        """Creatures or things named one by one, exactly as many as announced."""
        count, noun = self.rng.randint(2, 5), self.rng.choice(CREATURES + THINGS)
        listed = ", ".join([noun] * count)
        return f"{p.name} {self.verb('draw', 'drew')} {NUMBERS[count - 1]} {inflect(noun, True)}: {listed}."

    def recite(self, p: Person) -> str:
        """Numbers or days in their order, forwards or backwards, from a first to a last one."""
        words = self.rng.choice((NUMBERS, DAYS))[:: self.rng.choice((1, -1))]
        first, last = sorted(self.rng.sample(range(len(words)), 2))
        listed = ", ".join(words[first : last + 1])
        return f"{p.name} {self.verb('count', 'counted')} from {words[first]} to {words[last]}: {listed}."

    def quote(self, p: Person) -> str:
        """Nonsense that somebody says and somebody else repeats word for word."""
        spell = " ".join(self.rng.choices(SYLLABLES, k=self.rng.randint(3, 6)))
        echo = self.rng.choice([q.name for q in self.people if q is not p])
        return f'{p.name} {self.verb("say", "said")} "{spell}" and {echo} {self.verb("repeat", "repeated")} "{spell}".'

    def pack(self, p: Person) -> str:
        """Containers inside containers, each closed by the bracket of its own kind."""
        return f"{p.name} {self.verb('pack', 'packed')} a {self.container(3)}."

    def container(self, depth: int) -> str:
        """A container of one thing, and of another container before or after it where depth is left."""
        kind, left, right = self.rng.choice(CONTAINERS)
        inside = [self.rng.choice(THINGS)]
        if depth > 1:
            inside.insert(self.rng.randint(0, 1), self.container(depth - 1))
        return " ".join([kind, left, *inside, right])

    def agree(self, p: Person) -> str:
        """A subject, a clause with nouns of other numbers, and two verbs that agree with the subject alone."""
        numbers = many, others_many = self.rng.choices((False, True), k=2)
        subject, animal = (f"the {self.rng.choice(MOODS)} {inflect(self.rng.choice(CREATURES), n)}" for n in numbers)
        contact, place = self.rng.choice(CONTACTS), self.rng.choice(PLACES)
        clauses = (
            f"near the {inflect(place, others_many)}",
            f"that {self.verb(*contact, many)} {animal}",
            f"that {animal} near the {inflect(place, many)} {self.verb(*contact, others_many)}",
        )
        does = f"{self.verb(*self.rng.choice(ACTIONS), many)} and {self.be(many)} {self.rng.choice(MOODS)}"
        return f"{p.name} {self.verb('hear', 'heard')} that {subject} {self.rng.choice(clauses)} {does}."


def generate(seed: int, characters: int) -> str:
    """Exactly that many characters of text, made of paragraphs between blank lines.

    The same seed always gives the same text, and a longer text starts with the shorter one; texts of different seeds
    have no paragraph in common, for all practical purposes.
    """
    rng, documents, length = Random(seed), list[str](), 0
    while length < characters:
        documents.append(Document(rng).text() + "\n\n")
        length += len(documents[-1])
    return "".join(documents)[:characters]
