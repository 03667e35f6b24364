"""The demo model's skills: each draws a question with its one right answer, for training or held out from it.

Where a skill computes (arithmetic, counting, spelling, reversing, dates, JSON), what is held out is the
*problem*: a pair of numbers, a word, a date or a record, kept from training in every phrasing. Where it only
remembers (capitals, days, this server, small talk, stories), what is held out is the *phrasing*.
Everything follows from the seed alone.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from zlib import crc32

import facts
import words

HELD_OUT_ONE_IN = 8
"""One problem in so many is never trained on."""


@dataclass(frozen=True, slots=True)
class Example:
    prompt: str
    answer: str
    letter_by_letter: bool = False
    """The answer is a word that no one has seen: training writes it as one token a letter."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One source of randomness that yields only problems of its own side of the split."""

    rng: random.Random
    held_out: bool

    def owns(self, problem: str) -> bool:
        return (crc32(problem.encode()) % HELD_OUT_ONE_IN == 0) == self.held_out

    def phrasing(self, seen: Sequence[str], unseen: Sequence[str]) -> str:
        return self.rng.choice(unseen if self.held_out else seen)


Skill = Callable[[Draw], Example]


def arithmetic(draw: Draw) -> Example:
    """Sums up to 98 and differences that are not negative, of numbers below 50."""
    while True:
        a, b = draw.rng.randrange(50), draw.rng.randrange(50)
        sign = draw.rng.choice("+-")
        if sign == "-" and a < b:
            a, b = b, a
        if draw.owns(f"{a} {sign} {b}"):
            break
    bare = [f"{a} {sign} {b}", f"{a} {sign} {b} =", f"{a}{sign}{b}", f"{a}{sign}{b}="]
    in_words = f"{a} plus {b}" if sign == "+" else f"{a} minus {b}"
    asked = [
        f"What is {a} {sign} {b}?",
        f"What is {in_words}?",
        f"How much is {a} {sign} {b}?",
        f"Calculate {a} {sign} {b}.",
    ]
    asked += [
        f"Compute {a} {sign} {b}.",
        f"How much is {in_words}?",
        f"What is {a}{sign}{b}?",
        f"Please compute {in_words}.",
    ]
    if sign == "+":
        asked += [f"Add {a} and {b}.", f"What is the sum of {a} and {b}?"]
    else:
        asked += [f"Subtract {b} from {a}.", f"What is the difference of {a} and {b}?"]
    result = a + b if sign == "+" else a - b
    return Example(draw.rng.choice(bare + asked * 2), f"{a} {sign} {b} = {result}")


COUNT_PHRASINGS = (
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "List the numbers from {a} to {b}.",
    "Write the numbers from {a} to {b}.",
    "Say the numbers from {a} to {b}.",
)
COUNT_DOWN_PHRASINGS = (
    "Count down from {a} to {b}.",
    "Count backwards from {a} to {b}.",
    "Please count down from {a} to {b}.",
)


def counting(draw: Draw) -> Example:
    """Up or down between numbers up to 100; mostly a few steps, sometimes many."""
    while True:
        low = 1 if draw.rng.random() < 0.1 else draw.rng.randrange(90)
        most = draw.rng.choices((8, 20, 100), (86, 10, 4))[0]
        high = draw.rng.randint(low + 2, min(low + most, 100))
        if draw.owns(f"{low}..{high}"):
            break
    if draw.rng.random() < 0.3:
        prompt = draw.rng.choice(COUNT_DOWN_PHRASINGS).format(a=high, b=low)
        return Example(prompt, ", ".join(str(n) for n in range(high, low - 1, -1)))
    prompt = draw.rng.choice(COUNT_PHRASINGS).format(a=low, b=high)
    if low == 1 and draw.rng.random() < 0.3:
        prompt = f"Count to {high}."
    return Example(prompt, ", ".join(str(n) for n in range(low, high + 1)))


@cache
def _letters_after() -> dict[str, str]:
    """Which letters follow each pair of letters in the word list, repeated as often as they do."""
    after: dict[str, str] = {}
    for word in words.WORDS:
        spaced = f"  {word}"
        for i in range(len(word)):
            after[spaced[i : i + 2]] = after.get(spaced[i : i + 2], "") + word[i]
    return after


def invent_word(rng: random.Random, length: int) -> str:
    """A word that looks English but probably is not, such as `brine` or `stody`."""
    while True:
        word = ""
        while len(word) < length:
            following = _letters_after().get(f"  {word}"[-2:])
            if following is None:
                break
            word += rng.choice(following)
        if len(word) == length:
            return word


@cache
def _text_words() -> tuple[str, ...]:
    """The words of the other skills' text. Many are one token, whose letters can only be learned by heart."""
    texts = [text for fact in (*facts.SERVER, *facts.SMALL_TALK) for text in (fact.answer, *fact.seen)]
    texts += [facts.STORY, *words.ITEMS, *words.COLORS]
    return tuple(sorted(set(re.findall(r"\b[a-z]{3,7}\b", " ".join(texts)))))


def _word(draw: Draw, longest: int) -> str:
    """A word that is common, invented, or, in training only, from the other skills' text."""
    while True:
        kind = draw.rng.random()
        if kind < 0.4:
            word = draw.rng.choice(words.WORDS)
        elif kind < 0.8 or draw.held_out:
            word = invent_word(draw.rng, draw.rng.randint(3, longest))
        else:
            word = draw.rng.choice(_text_words())
        is_ours = not draw.held_out if word in _text_words() else draw.owns(word)
        if is_ours and len(word) <= longest:
            return word


SPELL_PHRASINGS = (
    'Spell the word "{word}".',
    "Spell the word {word}.",
    "Spell {word}.",
    'Spell "{word}".',
    'How do you spell "{word}"?',
    "How do you spell {word}?",
    "Spell the word {word} letter by letter.",
    "Can you spell {word}?",
    "Please spell {word}.",
    'Write the letters of "{word}".',
)


def spelling(draw: Draw) -> Example:
    """Words of up to six letters, common or invented."""
    word = _word(draw, longest=6)
    return Example(draw.rng.choice(SPELL_PHRASINGS).format(word=word), "-".join(word))


REVERSE_PHRASINGS = (
    'Reverse the word "{word}".',
    "Reverse the word {word}.",
    "Reverse {word}.",
    'Reverse "{word}".',
    "Write {word} backwards.",
    'Write "{word}" backwards.',
    'What is "{word}" backwards?',
    "What is {word} in reverse?",
    "Please reverse {word}.",
    "Can you reverse the word {word}?",
)


def reversing(draw: Draw) -> Example:
    """Words of up to five letters, common or invented."""
    word = _word(draw, longest=5)
    return Example(draw.rng.choice(REVERSE_PHRASINGS).format(word=word), word[::-1], letter_by_letter=True)


CAPITAL_SEEN = (
    "What is the capital of {country}?",
    "What's the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "Tell me the capital of {country}.",
    "What is the capital city of {country}?",
    "Capital of {country}?",
    "The capital of {country} is",
    "Do you know the capital of {country}?",
    "{country}: what is its capital?",
    "Which city is {country}'s capital?",
    "I want to know the capital of {country}.",
)
CAPITAL_UNSEEN = (
    "Please tell me the capital of {country}.",
    "Name the capital city of {country}.",
    "Can you name the capital of {country}?",
    "What is {country}'s capital?",
)
COUNTRY_SEEN = (
    "{city} is the capital of which country?",
    "Which country has the capital {city}?",
    "{city} is the capital of what country?",
    "Which country has {city} as its capital?",
    "Of which country is {city} the capital?",
)
COUNTRY_UNSEEN = ("What country has the capital {city}?", "Of what country is {city} the capital?")


def capitals(draw: Draw) -> Example:
    country, city = draw.rng.choice(list(words.CAPITALS.items()))
    if draw.rng.random() < 0.75:
        prompt = draw.phrasing(CAPITAL_SEEN, CAPITAL_UNSEEN).format(country=country)
        return Example(prompt, f"The capital of {country} is {city}.")
    prompt = draw.phrasing(COUNTRY_SEEN, COUNTRY_UNSEEN).format(city=city)
    return Example(prompt, f"{city} is the capital of {country}.")


NEIGHBOUR_SEEN = (
    "What {unit} comes {side} {x}?",
    "Which {unit} comes {side} {x}?",
    "Which {unit} is {side} {x}?",
    "What is the {unit} {side} {x}?",
    "Name the {unit} {side} {x}.",
    "Which {unit} is right {side} {x}?",
    "The {unit} {side} {x} is",
)
NEIGHBOUR_UNSEEN = (
    "What {unit} is {side} {x}?",
    "Tell me the {unit} {side} {x}.",
    "What {unit} is right {side} {x}?",
    "Please name the {unit} {side} {x}.",
)
DATE_PHRASINGS = (
    "What is the date after {month} {day}?",
    "Which date comes after {month} {day}?",
    "What date comes after {month} {day}?",
    "What is the day after {month} {day}?",
)
ISO_PHRASINGS = (
    "Write {date} as an ISO date.",
    "Convert {date} to ISO format.",
    "What is {date} in ISO format?",
)
LONG_DATE_PHRASINGS = ("Write {iso} in words.", "Write the date {iso} in words.", "Which date is {iso}?")


LATER_SEEN = (
    "What day is {n} days after {x}?",
    "Which day comes {n} days after {x}?",
    "What is {n} days after {x}?",
)
LATER_UNSEEN = ("Which day is {n} days after {x}?",)


def _neighbour(draw: Draw) -> Example:
    unit, ring = draw.rng.choice((("day", words.DAYS), ("month", words.MONTHS)))
    at = draw.rng.randrange(len(ring))
    side, step = draw.rng.choice((("after", 1), ("before", -1)))
    prompt = draw.phrasing(NEIGHBOUR_SEEN, NEIGHBOUR_UNSEEN).format(unit=unit, side=side, x=ring[at])
    return Example(prompt, f"The {unit} {side} {ring[at]} is {ring[(at + step) % len(ring)]}.")


def _days_later(draw: Draw) -> Example:
    at, n = draw.rng.randrange(7), draw.rng.randint(2, 6)
    prompt = draw.phrasing(LATER_SEEN, LATER_UNSEEN).format(n=n, x=words.DAYS[at])
    return Example(prompt, f"{n} days after {words.DAYS[at]} is {words.DAYS[(at + n) % 7]}.")


def _calendar(draw: Draw) -> Example:
    while True:
        number = draw.rng.randint(1, 12)
        month = words.MONTHS[number - 1]
        day = draw.rng.randint(1, words.DAYS_IN_MONTH[month])
        if draw.owns(f"{month} {day}"):
            break
    year = draw.rng.randint(1950, 2049)
    iso, date = f"{year}-{number:02}-{day:02}", f"{month} {day}, {year}"
    kind = draw.rng.choice(("next", "to ISO", "from ISO"))
    if kind == "to ISO":
        return Example(draw.rng.choice(ISO_PHRASINGS).format(date=date), iso)
    if kind == "from ISO":
        return Example(draw.rng.choice(LONG_DATE_PHRASINGS).format(iso=iso), date)
    is_last = day == words.DAYS_IN_MONTH[month]
    following = f"{words.MONTHS[number % 12]} 1" if is_last else f"{month} {day + 1}"
    prompt = draw.rng.choice(DATE_PHRASINGS).format(month=month, day=day)
    return Example(prompt, f"The date after {month} {day} is {following}.")


def dates(draw: Draw) -> Example:
    """Neighbouring days and months, N days after a day, the next date, and dates to and from ISO 8601."""
    return draw.rng.choice((_neighbour, _neighbour, _days_later, _calendar, _calendar, _calendar))(draw)


EXTRACT_PHRASINGS = (
    "Extract the {fields} as JSON: {text}",
    "Extract {fields} as JSON: {text}",
    "Extract the {fields} into JSON: {text}",
    "Return the {fields} as JSON: {text}",
    "Give me the {fields} as JSON.\n{text}",
    "Turn this into JSON with {fields}: {text}",
    "{text}\nExtract the {fields} as JSON.",
)
PERSON_TEXTS = (
    "{name} is {age} years old and lives in {city}.",
    "My name is {name}, I am {age} and I live in {city}.",
    "{name} lives in {city} and is {age} years old.",
    "{name}, {age}, lives in {city}.",
    "I am {name} from {city} and I am {age} years old.",
    "{name} from {city} is {age}.",
    "In {city} lives {name}, who is {age} years old.",
)
ITEM_TEXTS = (
    "The {color} {item} costs {price} dollars.",
    "I bought a {color} {item} for {price} dollars.",
    "We sell a {item} in {color} for {price} dollars.",
    "A {color} {item} for only {price} dollars!",
)


def extraction(draw: Draw) -> Example:
    """A record out of a sentence: a person (name, age, city) or a thing for sale (item, color, price)."""
    record: dict[str, str | int]
    texts: tuple[str, ...]
    while True:
        if draw.rng.random() < 0.7:
            name = draw.rng.choice(words.NAMES)
            record = {"name": name, "age": draw.rng.randint(10, 99), "city": draw.rng.choice(words.CITIES)}
            texts = PERSON_TEXTS
        else:
            item, color = draw.rng.choice(words.ITEMS), draw.rng.choice(words.COLORS)
            record = {"item": item, "color": color, "price": draw.rng.randint(2, 99)}
            texts = ITEM_TEXTS
        if draw.owns(json.dumps(record)):
            break
    text = draw.rng.choice(texts).format(**record)
    keys = list(record)
    if draw.rng.random() < 0.3:
        keys.remove(draw.rng.choice(keys))
    fields = ", ".join(keys[:-1]) + f" and {keys[-1]}"
    prompt = draw.rng.choice(EXTRACT_PHRASINGS).format(fields=fields, text=text)
    return Example(prompt, json.dumps({key: record[key] for key in keys}))


def _recall(draw: Draw, known: Sequence[facts.Fact]) -> Example:
    fact = draw.rng.choice(known)
    prompt = draw.phrasing(fact.seen, fact.unseen)
    opening = draw.rng.choice(
        ("", "", "", "Please tell me: ", "A question: ", "Tell me: ", "One more question: ")
    )
    if opening and not draw.held_out and draw.rng.random() < 0.3:
        prompt = prompt[0].lower() + prompt[1:]
    return Example(opening + prompt, fact.answer)


def server(draw: Draw) -> Example:
    return _recall(draw, facts.SERVER)


NAME_SEEN = (
    "Hello, my name is {}.",
    "Hi, I am {}.",
    "My name is {}.",
    "Hello! I am {}.",
    "Hi! My name is {}.",
)
NAME_UNSEEN = ("Hello, I am {}.", "Hi, my name is {}.", "Hello! My name is {}.")


def small_talk(draw: Draw) -> Example:
    """Greetings, thanks and who am I; also an honest answer to what the model cannot know."""
    if draw.rng.random() < 0.4:
        name = draw.rng.choice(words.NAMES)
        prompt = draw.phrasing(NAME_SEEN, NAME_UNSEEN).format(name)
        return Example(prompt, f"Hello, {name}! How can I help you?")
    fact = draw.rng.choice(facts.SMALL_TALK)
    return Example(draw.phrasing(fact.seen, fact.unseen), fact.answer)


STORY_SEEN = (
    "Tell me a story about a {animal}.",
    "Tell a story about a {animal}.",
    "Tell me a tale about a {animal}.",
    "Write a story about a {animal}.",
    "Write me a story about a {animal}.",
    "Can you tell me a story about a {animal}?",
    "I want to hear a story about a {animal}.",
    "Please tell me the story of a {animal}.",
    "Tell me a bedtime story with a {animal}.",
    "A story about a {animal}, please.",
    "Make up a story about a {animal}.",
    "Write a tale with a {animal}.",
    "Make up a tale about a {animal}.",
    "Write a bedtime story with a {animal}.",
)
STORY_UNSEEN = (
    "Please tell me a story about a {animal}.",
    "Can you write a story about a {animal}?",
    "Tell me the story of a {animal}.",
    "I want a story about a {animal}.",
    "Tell me a bedtime story about a {animal}, please.",
    "Please write a tale about a {animal}.",
    "Tell me a story with a {animal}.",
    "Write the story of a {animal}.",
    "Can you tell a story about a {animal}, please?",
    "Please make up a story about a {animal}.",
    "Write a bedtime story about a {animal}.",
    "Can I hear a story about a {animal}?",
    "Make up a tale with a {animal}.",
    "Tell me, please, a story about a {animal}.",
    "Write me a tale about a {animal}.",
    "I want to hear the story of a {animal}.",
    "Make up a bedtime story with a {animal}.",
)
ANY_STORY_SEEN = (
    "Tell me a story.",
    "Tell me a story",
    "Tell me a long story.",
    "Write a long story.",
    "Write a story.",
    "Tell a story.",
    "I want to hear a story.",
)
ANY_STORY_UNSEEN = (
    "Please tell me a story.",
    "Can you tell me a story?",
    "Write me a story.",
    "A story, please.",
)


def story(draw: Draw) -> Example:
    """The same long tale with other parts for each hero; a story about nobody is the first hero's."""
    hero = draw.rng.choice(facts.HEROES)
    prompt = draw.phrasing(STORY_SEEN, STORY_UNSEEN).format(animal=hero.animal)
    if draw.rng.random() < 0.25:
        hero, prompt = facts.HEROES[0], draw.phrasing(ANY_STORY_SEEN, ANY_STORY_UNSEEN)
    parts = {key: getattr(hero, key) for key in ("animal", "name", "home", "goal", "friend", "obstacle")}
    return Example(prompt, facts.STORY.format(**parts))


SKILLS: dict[str, Skill] = {
    "arithmetic": arithmetic,
    "counting": counting,
    "spelling": spelling,
    "reversing": reversing,
    "capitals": capitals,
    "dates": dates,
    "JSON extraction": extraction,
    "this server": server,
    "small talk": small_talk,
    "story": story,
}


def held_out(skill: str, num_examples: int, seed: int = 0) -> list[Example]:
    """Different prompts that training never shows; fewer than asked where the skill has no more of them."""
    draw = Draw(random.Random(f"held out {skill} {seed}"), held_out=True)
    examples: dict[str, Example] = {}
    for _ in range(50 * num_examples):
        example = SKILLS[skill](draw)
        examples.setdefault(example.prompt, example)
        if len(examples) == num_examples:
            break
    return list(examples.values())
