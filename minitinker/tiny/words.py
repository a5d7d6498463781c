"""The words of the corpus: plain English ones from a list, and made-up ones that can be pronounced.

The made-up words use every letter, as English hardly does, so that the string tasks are learned as rules on
letters; the real words keep the corpus legible. All are lower-case, of 3 to 7 letters, with at least one of
the five vowels. Nouns and verbs are regular: `with_s` is right for each of them.
"""

from random import Random

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """
    actor apple arm arrow artist aunt baby bag baker ball bank barn basket beach bean bear bed bee bell
    belt bench bird boat bone book boot bottle bowl box boy branch bread brick bridge brother brush bucket
    bus bush button cake camel camera camp candle car card carrot cart castle cat chain chair cherry chest
    chick church circle city class clock cloud clown coat coin comb cook corner couch cousin cow crab
    crayon crow crown cup dancer dentist desk dish doctor dog doll donkey door dress driver drum duck
    eagle ear egg engine eye face family farm farmer father fence finger fire flag floor flower forest
    fork fox friend frog game garden gate girl glass glove goat grape guest guitar hammer hand hat hen
    hill horse hotel house insect island jacket jar judge jungle kettle key king kitchen kite kitten
    ladder lady lake lamp lawyer lemon letter library lion lizard lock log lunch machine map market meal
    melon mirror monkey month moon mother nail neck needle nest nurse oak ocean office onion orange oven
    owl page paint palace panda paper park parrot party path peach pear pen pencil pepper piano picture
    pilot pirate planet plant plate pocket pond pony prince puppy queen rabbit river road robot rock roof
    room rope rose sailor school screen seed shark ship shirt shoe shop sister snake spider spoon squash
    stamp star station stone store storm street student summer table tailor teacher tent ticket tiger toe
    tower town toy train tree truck turtle uncle village violin wagon waiter wall watch whale wheel window
    winter witch wizard worker yard zebra
    """
)

VERBS = _words(
    """
    answer ask call carry catch chase clean cover dress drop feed fetch find follow greet guard hear help
    hide hold hug invite join kick kiss know lead leave lift like love marry meet miss need paint pass
    push reach save see serve show stop teach thank touch trust visit want warn wash watch
    """
)

ADJECTIVES = _words(
    """
    angry big bold brave bright busy calm cheap clean clever cold cool damp dark deep early empty fast
    fine flat fresh full gentle glad good grand great happy hard heavy high hot huge kind large late lazy
    light long loud low lucky narrow neat new nice noisy old plain poor proud quick quiet rare rich ripe
    rough round sad safe sharp short simple slow small smart smooth soft sour strange strong sweet tall
    thick thin tiny warm weak wet wide wild wise young
    """
)

COLORS = ("black", "blue", "brown", "gray", "green", "pink", "red", "white", "yellow")

WORDS = tuple(sorted({*NOUNS, *VERBS, *ADJECTIVES, *COLORS}))


def word(rng: Random, shortest: int = 3, longest: int = 7) -> str:
    """A word of `shortest` to `longest` letters (both within 3 to 7), listed or made up by even odds."""
    if rng.random() < 0.5:
        return made_up_word(rng, rng.randint(shortest, longest))
    while True:
        drawn = rng.choice(WORDS)
        if shortest <= len(drawn) <= longest:
            return drawn


def made_up_word(rng: Random, length: int) -> str:
    """A word of `length` letters in which neither three vowels nor three consonants follow each other.

    From three letters on it has a vowel. It may happen to be an English word.
    """
    letters = ""
    run = 0  # how many letters of the present kind end the word so far
    vowel = rng.random() < 0.25
    for _ in range(length):
        letters += rng.choice(VOWELS if vowel else CONSONANTS)
        run += 1
        if run == 2 or rng.random() < 0.8:
            vowel, run = not vowel, 0
    return letters


def with_s(stem: str) -> str:
    """The plural of a regular noun, or the third person of a regular verb: cats, foxes, babies."""
    if stem.endswith(("s", "x", "z", "ch", "sh")):
        return stem + "es"
    if stem.endswith("y") and stem[-2] not in VOWELS:
        return stem[:-1] + "ies"
    return stem + "s"
