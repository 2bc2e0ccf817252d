"""Short notes of many kinds with the facts they hold: raw material for reading tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from scripts.make_demo import words

# What a note is about -> ways to say it. `{thing}` is an object.
TOPICS: Mapping[str, tuple[str, ...]] = {
    "broken": (
        "The {thing} broke on the second day.",
        "My {thing} does not work any more.",
        "The {thing} fell apart in my hands.",
        "There is a hole in the {thing}.",
        "One side of the {thing} is bent.",
        "The {thing} came out of the box in two pieces.",
        "The {thing} stopped after an hour.",
        "A part of the {thing} has snapped off.",
        "The {thing} has a deep scratch.",
        "I opened the parcel and the {thing} was damaged.",
    ),
    "late": (
        "The {thing} should have been here last week.",
        "I am still waiting for the {thing}.",
        "The {thing} has not come yet.",
        "You said three days, but there is no {thing} so far.",
        "Nobody brought the {thing}.",
        "How much longer must I wait for the {thing}?",
        "The {thing} is ten days late.",
        "Where is my {thing}?",
    ),
    "lost": (
        "I left my {thing} on a seat.",
        "I cannot find my {thing}.",
        "I think I lost the {thing} in your hall.",
        "My {thing} is gone.",
        "Has anybody handed in a {thing}?",
        "The {thing} must have dropped out of my bag.",
    ),
    "wrong": (
        "I asked for a {thing} and got something else.",
        "This is not the {thing} that I ordered.",
        "The {thing} has the wrong size.",
        "You gave me another person's {thing}.",
        "The {thing} is in the wrong colour.",
        "The picture showed a {thing}, but the box holds a different one.",
    ),
    "dirty": (
        "The {thing} is full of dust.",
        "There are spots all over the {thing}.",
        "The {thing} smells bad.",
        "Somebody should wash the {thing}.",
        "The {thing} was sticky when I touched it.",
    ),
    "money": (
        "You took the money for the {thing} twice.",
        "The bill for the {thing} is too high.",
        "I paid for the {thing} but the bill came again.",
        "The price of the {thing} on the bill is not what we agreed.",
        "I want my money back for the {thing}.",
        "Please pay back what I gave for the {thing}.",
    ),
    "question": (
        "Can I use the {thing} in the rain?",
        "How do I clean the {thing}?",
        "Do you sell a cover for the {thing}?",
        "Is the {thing} safe for children?",
        "How heavy is the {thing}?",
        "Does the {thing} need oil?",
        "What is the {thing} made of?",
        "Could you tell me how the {thing} works?",
    ),
    "thanks": (
        "The {thing} is just what I wanted.",
        "We all love the {thing}.",
        "Thank you for the lovely {thing}.",
        "The {thing} works very well.",
        "I have never had a better {thing}.",
        "Many thanks for your help with the {thing}.",
    ),
    "wish": (
        "I would like to buy a second {thing}.",
        "Please keep a {thing} for me.",
        "I need a new {thing}.",
        "May I rent the {thing} for a day?",
        "We want to order one more {thing}.",
        "Please put me on the list for the {thing}.",
    ),
    "cancel": (
        "I do not need the {thing} any more.",
        "Please take the {thing} off my list.",
        "I changed my mind about the {thing}.",
        "Do not send the {thing}.",
        "We must call off the order for the {thing}.",
    ),
}

PROBLEMS = frozenset({"broken", "late", "lost", "wrong", "dirty", "money"})

HURRY = (
    "It is urgent.",
    "Please be quick.",
    "I need an answer today.",
    "This cannot wait.",
    "Please hurry.",
    "Call me at once.",
    "I must know by tonight.",
)
NO_HURRY = (
    "Take your time.",
    "There is no hurry.",
    "It is not urgent.",
    "Any time next month is fine.",
    "I can wait.",
    "Whenever it suits you.",
)

OPENINGS = ("Hello.", "Good day.", "Hi,", "Dear all,", "Good morning.", "Hello there.", "Dear Sir,")
CLOSINGS = ("Thank you.", "Thanks.", "All the best.", "Bye.", "Greetings.", "Please write back.")
INTRODUCTIONS = (
    "I am {name}.",
    "My name is {name}.",
    "This is {name}.",
    "{name} here.",
    "It is {name} again.",
    "You know me, I am {name}.",
)
SIGNATURES = ("{name}", "Yours, {name}", "Kind regards, {name}", "From {name}", "- {name}")
HOMES = ("I live in {town}.", "I write from {town}.", "We are in {town}.", "I come from {town}.")
NUMBER_KINDS = (
    "account",
    "bill",
    "booking",
    "card",
    "case",
    "file",
    "invoice",
    "locker",
    "number",
    "order",
    "parcel",
    "room",
    "ticket",
)
NUMBERS = (
    "The {kind} is {number}.",
    "My {kind} is {number}.",
    "It is about {kind} {number}.",
    "{Kind} {number}.",
    "{Kind}: {number}.",
    "See {kind} {number}.",
    "(ref {number})",
    "I wrote {number} on the form.",
)
DATES = ("I came by on {day}.", "It was on {day}.", "That was last {day}.", "I called on {day}.")

REPORTS = (
    "{name} from {town} ordered {a_thing} on {day}. The {kind} is {number}.",
    "On {day} {name} of {town} bought {a_thing} and paid {number} crowns.",
    "{name} lives in {town} and has {a_thing}. The {kind} is {number}.",
    "{Kind} {number}: {a_thing} for {name}, {town}, {day}.",
    "On {day} we sent {a_thing} to {name} in {town}, {kind} {number}.",
    "{name} will bring {a_thing} to {town} next {day}, {kind} {number}.",
    "{name} lost {a_thing} in {town} on {day}. It has the {kind} {number}.",
    "The {thing} with {kind} {number} goes to {name} in {town} on {day}.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A text and what it says.

    Attributes:
        text: What was written, one paragraph.
        facts: Field name -> value as it stands in the text: some of `name`, `thing`, `number`,
            `town`, `day`; `name` and `thing` always.
        first, last: The two parts of the name.
        topic: Key of `TOPICS`, or None for a report.
        hurry: True or False where the text says so, else None.
    """

    text: str
    facts: Mapping[str, str]
    first: str
    last: str
    topic: str | None = None
    hurry: bool | None = None


def report(rng: random.Random) -> Note:
    """One or two sentences in the third person that hold four or five facts."""
    first, last = words.first_name(rng), words.surname(rng)
    facts = {
        "name": f"{first} {last}",
        "thing": words.thing(rng),
        "number": words.number(rng),
        "town": words.town(rng),
        "day": rng.choice(words.DAYS),
    }
    kind = rng.choice(NUMBER_KINDS)
    form = rng.choice(REPORTS)
    text = form.format(
        **facts, a_thing=words.with_article(facts["thing"]), kind=kind, Kind=kind.capitalize()
    )
    told = {field: value for field, value in facts.items() if value in text}
    return Note(text=text, facts=told, first=first, last=last)


def letter(rng: random.Random, *, topic: str | None = None) -> Note:
    """A short message in the first person on one topic, its parts in a free order."""
    first, last = words.first_name(rng), words.surname(rng)
    topic = topic or rng.choice(tuple(TOPICS))
    facts = {"name": f"{first} {last}", "thing": words.thing(rng)}
    parts = [rng.choice(TOPICS[topic]).format(thing=facts["thing"])]
    if rng.random() < 0.75:
        facts["number"] = words.number(rng)
        kind = rng.choice(NUMBER_KINDS)
        parts.append(
            rng.choice(NUMBERS).format(number=facts["number"], kind=kind, Kind=kind.capitalize())
        )
    if rng.random() < 0.4:
        facts["town"] = words.town(rng)
        parts.append(rng.choice(HOMES).format(town=facts["town"]))
    if rng.random() < 0.3:
        facts["day"] = rng.choice(words.DAYS)
        parts.append(rng.choice(DATES).format(day=facts["day"]))
    hurry = rng.choice((True, False, None))
    if hurry is not None:
        parts.append(rng.choice(HURRY if hurry else NO_HURRY))
    if rng.random() < 0.3:
        parts.append(words.aside(rng))
    signed = rng.random() < 0.4
    if not signed:
        parts.append(rng.choice(INTRODUCTIONS).format(name=facts["name"]))
    rng.shuffle(parts)
    if rng.random() < 0.5:
        parts.insert(0, rng.choice(OPENINGS))
    if rng.random() < 0.4:
        parts.append(rng.choice(CLOSINGS))
    if signed:
        parts.append(rng.choice(SIGNATURES).format(name=facts["name"]))
    return Note(text=" ".join(parts), facts=facts, first=first, last=last, topic=topic, hurry=hurry)


def note(rng: random.Random) -> Note:
    """A report or a letter."""
    return report(rng) if rng.random() < 0.3 else letter(rng)
