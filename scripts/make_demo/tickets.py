"""The demo's data set: messages to a shop, and the ticket lines its staff would write.

    python -m scripts.make_demo.tickets src/eightgig/demo/data/tickets.jsonl

The shop, its codes and its line are made up for the demo and are not in the pretraining corpus, so
the base model cannot know them. Every row draws name, item, order number, matter and urgency
freely, so that no answer can be looked up.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.make_demo.words import word_list

NUM_ROWS = 640
SEED = "eightgig-demo-tickets"
SYSTEM_PROMPT = "You file tickets for Kestrel Bikes."

FIRST_NAMES = word_list("""
    Alma Amelie Aron Asha Axel Basil Beate Ben Berta Bodil Cato Celia Clemens Cora Dagny Dalia
    Damian Delia Edda Edwin Eleni Elin Ewan Fabian Faye Finn Flora Gavin Gerda Gideon Greer
    Gunnar Hedda Heidi Holger Ilse Imran Ingo Irma Jarl Jorge Juno Kaspar Kerstin Kira Lasse
    Leander Lilo Lorna Mads Mara Maren Mattis Merle Moritz Nelly Nico Odile Orla Osman Paula
    Pavel Quentin Rafael Ragna Rasmus Renate Roland Runa Selma Silas Sunniva Thea Tobias Ulla
    Valentin Vibeke Wendel Xenia Yannis Zelda
""")
LAST_NAMES = word_list("""
    Aalto Abel Albers Amundsen Arendt Ashby Bakker Baumann Beckett Bergman Birk Bohr Borg
    Brandal Brenner Carlsen Conrad Dahl Decker Delgado Drake Eberhart Egeland Ekman Falk Fenwick
    Fjord Garland Gerber Grieg Haas Halden Hammond Hauser Hedlund Hoffman Holmberg Iversen
    Jacobi Jarvis Kessler Kirby Kramer Krog Lambert Laurent Lindqvist Lorenz Madsen Mancini
    Melville Mercer Moen Norris Nygaard Oakley Ohlin Paulsen Perrin Petrov Pratt Quist Ramsey
    Reuter Ritter Rosen Sander Sawyer Schuler Selby Solberg Strand Tanner Thorsen Ulrich Vance
    Vogel Waldorf Wexler Winkler Zander Zimmer
""")
ITEM_STARTS = word_list("""
    alloy carbon city classic comfort compact cross disc dual enduro gravel hybrid junior kids
    leather mini mountain narrow night padded race rear road sport steel touring trail travel
    trekking winter
""")
ITEM_ENDS = word_list("""
    bell bottle brake cassette chain child_seat computer crank fender frame fork gloves grip
    helmet hub jacket lamp light lock mirror mudguard pedal pump rack rim saddle shoes spokes
    stand stem tyre wheel
""")


@dataclass(frozen=True, kw_only=True, slots=True)
class Matter:
    """One kind of message: the shop's code for it and ways to say it."""

    code: str
    sentences: tuple[str, ...]


MATTERS: Mapping[str, Matter] = {
    "damaged": Matter(
        code="K7",
        sentences=(
            "The {item} arrived with a crack.",
            "When I unpacked the {item}, it was bent.",
            "The {item} in my parcel is broken.",
            "One screw of the {item} had snapped off in transit.",
            "The new {item} has dents all over.",
            "The {item} was already damaged when it came.",
            "Sadly the {item} reached me in pieces.",
            "There is a split down the side of the {item} you sent.",
        ),
    ),
    "late": Matter(
        code="T2",
        sentences=(
            "The {item} has still not arrived.",
            "I have been waiting three weeks for the {item}.",
            "The {item} was promised for last Monday and is not here.",
            "When will the {item} finally be delivered?",
            "The tracking of the {item} has not moved for days.",
            "No sign of the {item} yet.",
            "My {item} seems to be stuck in the post.",
            "You shipped the {item} long ago, but nothing came.",
        ),
    ),
    "wrong": Matter(
        code="W5",
        sentences=(
            "Instead of the {item} I got another part.",
            "You packed something else, not the {item}.",
            "The {item} you sent is not the model I chose.",
            "I ordered the {item} in black and received it in red.",
            "The {item} came in size S, but I bought size L.",
            "The box says {item}, yet a different one is inside.",
            "Somebody mixed up my {item} with another order.",
            "This {item} is not the one on my receipt.",
        ),
    ),
    "return": Matter(
        code="R1",
        sentences=(
            "I would like to send the {item} back.",
            "The {item} does not suit me, please refund it.",
            "How can I return the {item}?",
            "I no longer need the {item} and want my money back.",
            "Please take back the {item}.",
            "I want to give back the unused {item}.",
            "Kindly refund the {item}, I found a better one.",
            "May I swap the {item} for a voucher?",
        ),
    ),
    "billing": Matter(
        code="B9",
        sentences=(
            "I was charged twice for the {item}.",
            "The invoice for the {item} shows a wrong sum.",
            "My card was billed for the {item} although I paid by transfer.",
            "The discount on the {item} is missing from the invoice.",
            "Please correct the amount for the {item}.",
            "The receipt for the {item} has the wrong tax.",
            "You forgot my coupon when you billed the {item}.",
            "Why is the {item} on my bill two times?",
        ),
    ),
    "howto": Matter(
        code="H4",
        sentences=(
            "How do I mount the {item}?",
            "Which tool fits the {item}?",
            "Is there a manual for the {item}?",
            "Will the {item} fit a 28 inch bike?",
            "How tight should I fasten the {item}?",
            "Could you explain how to adjust the {item}?",
            "Can the {item} get wet?",
            "What grease should I use on the {item}?",
        ),
    ),
    "workshop": Matter(
        code="S3",
        sentences=(
            "Can your workshop repair my {item}?",
            "I need a slot to have the {item} serviced.",
            "After a year the {item} squeaks, may I bring it in?",
            "Please book me in so you can fix the {item}.",
            "The {item} needs a tune-up by your mechanic.",
            "When could you look at my worn {item}?",
            "I would like an inspection of the {item}.",
            "Do you have time to service the {item}?",
        ),
    ),
    "praise": Matter(
        code="G8",
        sentences=(
            "The {item} is fantastic.",
            "I am delighted with the {item}.",
            "Great work, the {item} rides like a dream.",
            "Best {item} I ever had.",
            "Just wanted to say that the {item} is superb.",
            "Your {item} made my tour perfect.",
            "Compliments to the team for the {item}.",
            "The {item} surpassed all my hopes.",
        ),
    ),
}

PRIORITIES: Mapping[str, tuple[str, ...]] = {
    "P1": (
        "I leave on a tour tomorrow.",
        "Please answer today.",
        "This is very urgent.",
        "I need my bike for work right away.",
        "My race is this weekend, so act fast.",
        "As soon as possible, please.",
    ),
    "P2": ("",),
    "P3": (
        "No rush at all.",
        "Whenever you find the time.",
        "It can wait until next month.",
        "There is plenty of time.",
        "Answer when you like.",
        "The season is over anyway, so no hurry.",
    ),
}
GREETINGS = ("", "", "Hello Kestrel,", "Hi there,", "Good evening,", "Dear team,", "Hey,")
ORDERS = (
    "Order {order}.",
    "My order is {order}.",
    "It concerns order {order}.",
    "The order number is {order}.",
    "Order no. {order}.",
    "(order {order})",
    "You will find it under {order}.",
    "Reference: {order}.",
)
NAMES = (
    "My name is {name}.",
    "I am {name}.",
    "{name} here.",
    "This is {name} writing.",
    "It was bought by {name}.",
)
SIGNATURES = ("Best, {name}", "{name}", "Cheers, {name}", "Regards, {name}", "Thanks, {name}")
# True of the sender, of no use for the ticket.
ASIDES = (
    "I have been a customer for 6 years.",
    "My brother told me about your shop.",
    "I ride 20 km every day.",
    "It rained a lot here.",
    "The parcel was left at number 12.",
    "I cycle to school with my daughter.",
    "Your web page was slow.",
    "I tried to phone you on Friday.",
)


def ticket_row(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """One message and its ticket line as a chat."""
    first, last = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
    item = f"{rng.choice(ITEM_STARTS)} {rng.choice(ITEM_ENDS)}"
    order = str(rng.randrange(10_000, 100_000))
    matter = MATTERS[rng.choice(tuple(MATTERS))]
    priority = rng.choice(tuple(PRIORITIES))
    parts = [
        rng.choice(matter.sentences).format(item=item),
        rng.choice(ORDERS).format(order=order),
        rng.choice(PRIORITIES[priority]),
    ]
    if rng.random() < 0.3:
        parts.append(rng.choice(ASIDES))
    is_signed = rng.random() < 0.5
    if not is_signed:
        parts.append(rng.choice(NAMES).format(name=f"{first} {last}"))
    rng.shuffle(parts)
    parts.insert(0, rng.choice(GREETINGS))
    if is_signed:
        parts.append(rng.choice(SIGNATURES).format(name=f"{first} {last}"))
    message = " ".join(part for part in parts if part)
    ticket = f"{matter.code} | {priority} | #{order} | {item} | {last}, {first}"
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": message},
            {"role": "assistant", "content": ticket},
        ]
    }


def ticket_rows(count: int = NUM_ROWS) -> list[dict[str, list[dict[str, str]]]]:
    """The data set: rows with different messages."""
    rng = random.Random(SEED)
    rows: dict[str, dict[str, list[dict[str, str]]]] = {}
    while len(rows) < count:
        row = ticket_row(rng)
        rows.setdefault(row["messages"][1]["content"], row)
    return list(rows.values())


def write_rows(path: Path) -> None:
    """Write the data set as JSONL."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ticket_rows()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]))
