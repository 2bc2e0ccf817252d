"""The text that the demo model is pretrained on: chats and plain text, made by the thousand.

Every document is drawn from a seeded generator, so the whole corpus is a function of the seed. It
teaches to read short notes, to copy names and numbers, and to follow instructions about form. The
demo's task (`tickets.py`) is not in it: not its shop, not its codes, not its ticket line.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence

from scripts.make_demo import words
from scripts.make_demo.notes import PROBLEMS, TOPICS, Note, letter, note, report

# Turns of a chat: (role, content), roles as in the chat template's input.
Chat = list[tuple[str, str]]
Document = Chat | str

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer briefly.",
    "Do what the user asks and nothing else.",
    "You are a careful clerk.",
    "You read notes and answer questions.",
    "Be exact.",
)
EMPLOYERS = (
    "You work for the {business} in {town}.",
    "You help the {business} of {town}.",
    "You answer the letters of {name} and Sons.",
    "You are the clerk of the {town} {business}.",
    "You sort the mail of the {business} in {town}.",
    "You take notes for {name}.",
)
SEPARATORS = (", ", "; ", " / ", " - ", " | ", ": ", " + ", " > ", "\n")
SEPARATOR_NAMES = {
    ", ": "commas",
    "; ": "semicolons",
    " / ": "slashes",
    " - ": "dashes",
    " | ": "bars",
    "\n": "line breaks",
    " + ": "plus signs",
}
FIELD_WORDS = {
    "name": ("name", "writer", "person", "customer", "full name"),
    "thing": ("thing", "object", "item", "article", "product"),
    "number": ("number", "reference", "figure"),
    "town": ("town", "place", "city"),
    "day": ("day", "weekday"),
}
FIELD_QUESTIONS = {
    "name": ("Who is it?", "Which person is named?", "Whose note is it?", "Give the full name."),
    "thing": ("What is it about?", "Which object is named?", "Name the thing.", "Give the item."),
    "number": ("Which number is given?", "Give the number.", "What is the number?"),
    "town": ("Which town?", "Where is the person from?", "Give the town.", "Name the place."),
    "day": ("Which day?", "When was it?", "Give the day.", "Name the weekday."),
}
FIELD_SENTENCES = {
    "name": "The person is {value}.",
    "thing": "It is about the {value}.",
    "number": "The number is {value}.",
    "town": "The town is {value}.",
    "day": "The day is {value}.",
}
SUMMARIES = {
    "broken": "{name} has a broken {thing}.",
    "late": "{name} is waiting for the {thing}.",
    "lost": "{name} has lost the {thing}.",
    "wrong": "{name} got the wrong {thing}.",
    "dirty": "{name} says that the {thing} is dirty.",
    "money": "{name} writes about the money for the {thing}.",
    "question": "{name} has a question about the {thing}.",
    "thanks": "{name} likes the {thing}.",
    "wish": "{name} wants the {thing}.",
    "cancel": "{name} does not want the {thing}.",
}
REPLIES = {
    "broken": "I am sorry that the {thing} is broken, {first}.",
    "late": "I am sorry that you must wait for the {thing}, {first}.",
    "lost": "We will look for the {thing}, {first}.",
    "wrong": "I am sorry that you got the wrong {thing}, {first}.",
    "dirty": "We will clean the {thing}, {first}.",
    "money": "We will check the bill for the {thing}, {first}.",
    "question": "I will ask about the {thing}, {first}.",
    "thanks": "I am glad that you like the {thing}, {first}.",
    "wish": "I will note that you want the {thing}, {first}.",
    "cancel": "We will cancel the {thing}, {first}.",
}
TOPIC_LABELS = {
    "broken": ("broken", "damage", "defect", "repair"),
    "late": ("late", "delay", "waiting", "delivery"),
    "lost": ("lost", "loss", "missing"),
    "wrong": ("wrong", "mistake", "mix-up"),
    "dirty": ("dirty", "dirt", "cleaning"),
    "money": ("money", "bill", "payment"),
    "question": ("question", "asking", "advice"),
    "thanks": ("thanks", "praise", "happy"),
    "wish": ("wish", "order", "sale"),
    "cancel": ("cancel", "stop", "withdrawn"),
}
TOPIC_QUESTIONS = ("What kind of note is it?", "Which label fits?", "Sort the note.", "Classify.")


def _with_text(rng: random.Random, instruction: str, text: str) -> str:
    """One user turn of an instruction and a text, either first."""
    form = rng.choice((
        "{instruction}\n{text}",
        "{text}\n{instruction}",
        "{instruction} Text: {text}",
        "Note: {text}\n{instruction}",
        "{instruction}\n\n{text}",
    ))  # fmt: skip
    return form.format(instruction=instruction, text=text)


def _ask(rng: random.Random, instruction: str, text: str, answer: str) -> Chat:
    """A chat of one question about a text."""
    return [("user", _with_text(rng, instruction, text)), ("assistant", answer)]


def _some_fields(rng: random.Random, source: Note, *, least: int = 2) -> list[str]:
    """Names of some fields of a note in a random order."""
    fields = list(source.facts)
    rng.shuffle(fields)
    return fields[: rng.randint(min(least, len(fields)), len(fields))]


# --- reading notes -------------------------------------------------------------------------------


def one_field(rng: random.Random) -> Chat:
    source = note(rng)
    field = rng.choice(list(source.facts))
    value = source.facts[field]
    question = rng.choice(FIELD_QUESTIONS[field])
    if rng.random() < 0.25:
        return _ask(
            rng,
            f"{question} Answer in a sentence.",
            source.text,
            FIELD_SENTENCES[field].format(value=value),
        )
    return _ask(rng, question, source.text, value)


def fields_in_a_row(rng: random.Random) -> Chat:
    source = note(rng)
    fields = _some_fields(rng, source)
    separator = rng.choice(tuple(SEPARATOR_NAMES))
    names = [rng.choice(FIELD_WORDS[field]) for field in fields]
    wanted = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    instruction = rng.choice((
        "Give {wanted} with {separator} between them.",
        "Write {wanted}, separated by {separator}.",
        "Take out {wanted}. Use {separator}.",
    )).format(wanted=wanted, separator=SEPARATOR_NAMES[separator])  # fmt: skip
    return _ask(rng, instruction, source.text, separator.join(source.facts[f] for f in fields))


def fields_in_a_form(rng: random.Random) -> Chat:
    source = note(rng)
    fields = _some_fields(rng, source)
    slots = {field: rng.choice(FIELD_WORDS[field]) for field in fields}
    left, right = rng.choice((("<", ">"), ("[", "]"), ("(", ")"), ("{", "}")))
    separator = rng.choice(SEPARATORS)
    parts, filled = [], []
    for field in fields:
        mark = rng.choice(("", "", "", "No. ", "for ", "# ", "* ", f"{slots[field]}: ", "@ "))
        parts.append(f"{mark}{left}{slots[field]}{right}")
        filled.append(mark + source.facts[field])
    lead = rng.choice(("", "", f"{words.made_up_word(rng)} "))
    instruction = rng.choice(("Fill in: {form}", "Use this form: {form}", "Form: {form}"))
    return _ask(
        rng,
        instruction.format(form=lead + separator.join(parts)),
        source.text,
        lead + separator.join(filled),
    )


def fields_as_lines(rng: random.Random) -> Chat:
    source = note(rng)
    fields = _some_fields(rng, source)
    keys = [rng.choice(FIELD_WORDS[field]) for field in fields]
    sign = rng.choice((": ", " = ", " is "))
    lines = "\n".join(f"{k}{sign}{source.facts[f]}" for k, f in zip(keys, fields, strict=True))
    instruction = f"Write lines for {', '.join(keys)}, like {keys[0]}{sign}..."
    return _ask(rng, instruction, source.text, lines)


def fields_as_json(rng: random.Random) -> Chat:
    source = note(rng)
    fields = _some_fields(rng, source)
    keys = [rng.choice(FIELD_WORDS[field]).replace(" ", "_") for field in fields]
    values = {key: source.facts[field] for key, field in zip(keys, fields, strict=True)}
    is_nested = rng.random() < 0.2
    instruction = rng.choice((
        "Give JSON with the keys {keys}.",
        "Write it as JSON: {keys}.",
        "Make a JSON object of {keys}.",
    )).format(keys=", ".join(keys))  # fmt: skip
    if is_nested:
        instruction += " Put it under the key note."
    answer = json.dumps({"note": values} if is_nested else values)
    return _ask(rng, instruction, source.text, answer)


def surname_first(rng: random.Random) -> Chat:
    source = note(rng)
    answer, instruction = rng.choice((
        (f"{source.last}, {source.first}", "Give the name, surname first, with a comma."),
        (f"{source.last} {source.first}", "Give the surname, then the first name."),
        (source.last, "Give the surname only."),
        (source.first, "Give the first name only."),
        (f"Dear {source.first},", "Begin an answer to the person."),
    ))  # fmt: skip
    return _ask(rng, instruction, source.text, answer)


def topic_label(rng: random.Random) -> Chat:
    topics = rng.sample(tuple(TOPICS), rng.choice((2, 3, 4, 5)))
    source = letter(rng, topic=rng.choice(topics))
    labels = {topic: rng.choice(TOPIC_LABELS[topic]) for topic in topics}
    instruction = f"{rng.choice(TOPIC_QUESTIONS)} Labels: {', '.join(labels.values())}."
    return _ask(rng, instruction, source.text, labels[str(source.topic)])


def topic_code(rng: random.Random) -> Chat:
    topics = rng.sample(tuple(TOPICS), rng.choice((2, 3, 4)))
    source = letter(rng, topic=rng.choice(topics))
    codes = dict(zip(topics, _codes(rng, len(topics)), strict=True))
    sign = rng.choice((" = ", ": ", " is "))
    table = ", ".join(f"{rng.choice(TOPIC_LABELS[t])}{sign}{codes[t]}" for t in topics)
    answer = codes[str(source.topic)]
    if rng.random() < 0.4:
        field = rng.choice(list(source.facts))
        asked = rng.choice(FIELD_WORDS[field])
        instruction = f"Codes: {table}. Write the code, then the {asked}."
        return _ask(rng, instruction, source.text, f"{answer} {source.facts[field]}")
    return _ask(rng, f"Codes: {table}. Give the code.", source.text, answer)


def _codes(rng: random.Random, count: int) -> list[str]:
    """Different codes of one shape. A letter with one digit is the demo's shape: not here."""
    shape = rng.choice(("digit", "letter", "word", "letters", "numbered"))
    if shape == "digit":
        return rng.sample("0123456789", count)
    if shape == "letter":
        return rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", count)
    if shape == "letters":
        pairs = [a + b for a in "ABDEGKLMNPRSTVX" for b in "AEIOUXZ"]
        return rng.sample(pairs, count)
    if shape == "numbered":
        return [f"{words.made_up_word(rng)}-{n}" for n in rng.sample(range(10, 100), count)]
    return [words.made_up_word(rng) for _ in range(count)]


def yes_or_no(rng: random.Random) -> Chat:
    source = letter(rng)
    questions = [
        ("Does the note give a number?", "number" in source.facts),
        ("Is there a town in the note?", "town" in source.facts),
        ("Is a day named?", "day" in source.facts),
        ("Is there a problem?", source.topic in PROBLEMS),
        ("Is it a question?", source.topic == "question"),
        ("Is the person pleased?", source.topic == "thanks"),
    ]
    if source.hurry is not None:
        questions += [("Is it urgent?", source.hurry), ("Can it wait?", not source.hurry)]
    question, is_true = rng.choice(questions)
    return _ask(rng, f"{question} Yes or no?", source.text, "Yes" if is_true else "No")


def hurry_label(rng: random.Random) -> Chat:
    source = letter(rng)
    labels = rng.choice((("urgent", "normal", "low"), ("now", "soon", "later"), ("3", "2", "1")))
    index = {True: 0, None: 1, False: 2}[source.hurry]
    instruction = (
        f"How urgent is it? {labels[0]} (in a hurry), {labels[1]} or {labels[2]} (can wait)"
    )
    return _ask(rng, instruction, source.text, labels[index])


def summary(rng: random.Random) -> Chat:
    source = letter(rng)
    answer = SUMMARIES[str(source.topic)].format(**source.facts)
    if "number" in source.facts and rng.random() < 0.3:
        return _ask(
            rng,
            "Sum up in a sentence and add the number.",
            source.text,
            f"{answer[:-1]}, number {source.facts['number']}.",
        )
    instruction = rng.choice(("Sum up in a sentence.", "What does the note say?", "In short?"))
    return _ask(rng, instruction, source.text, answer)


def reply(rng: random.Random) -> Chat:
    source = letter(rng)
    answer = REPLIES[str(source.topic)].format(thing=source.facts["thing"], first=source.first)
    if source.hurry:
        answer += " We will hurry."
    return [("user", source.text), ("assistant", answer)]


def by_example(rng: random.Random) -> Chat:
    """Several notes answered in one made-up form that no instruction spells out."""
    turns: Chat = [("system", rng.choice(("Follow the examples.", "Go on in the same form.")))]
    separator = rng.choice(SEPARATORS)
    lead = rng.choice(("", "", words.made_up_word(rng) + " ", "* "))
    use_codes = rng.random() < 0.6
    codes = dict(zip(TOPICS, _codes(rng, len(TOPICS)) if use_codes else TOPICS, strict=True))
    fields = rng.sample(("name", "thing", "topic", "number", "last"), rng.choice((2, 3, 3)))
    topics = rng.sample(tuple(TOPICS), 2)
    for _ in range(rng.choice((3, 4))):
        source = letter(rng, topic=rng.choice(topics))
        values = {
            "last": f"{source.last}, {source.first}",
            "topic": codes[str(source.topic)],
            **source.facts,
        }
        answer = lead + separator.join(values.get(field, "none") for field in fields)
        turns += [("user", source.text), ("assistant", answer)]
    return turns


# --- words and lists -----------------------------------------------------------------------------


def repeat(rng: random.Random) -> Chat:
    kind = rng.random()
    if kind < 0.3:
        text = " ".join(words.made_up_word(rng) for _ in range(rng.randint(1, 6)))
    elif kind < 0.5:
        text = note(rng).text
    elif kind < 0.7:
        text = f"{words.first_name(rng)} {words.surname(rng)}, {words.town(rng)}"
    else:
        text = " ".join(
            rng.choice((words.number, words.thing, words.surname))(rng)
            for _ in range(rng.randint(1, 5))
        )
    instruction = rng.choice(("Repeat: {}", "Say this again: {}", "Copy the text.\n{}", "Echo {}"))
    return [("user", instruction.format(text)), ("assistant", text)]


def _items(rng: random.Random, *, least: int = 3, most: int = 7) -> list[str]:
    """Different things of one kind."""
    count = rng.randint(least, most)
    kind = rng.choice(("object", "food", "animal", "name", "number", "word", "thing"))
    if kind in ("object", "food", "animal"):
        pool = {"object": words.OBJECTS, "food": words.FOODS, "animal": words.ANIMALS}[kind]
        return rng.sample(pool, count)
    make: Callable[[random.Random], str] = {
        "name": words.first_name,
        "number": words.number,
        "word": words.made_up_word,
        "thing": words.thing,
    }[kind]
    return list(dict.fromkeys(make(rng) for _ in range(count)))


def list_form(rng: random.Random) -> Chat:
    items = _items(rng)
    given = ", ".join(items)
    forms: tuple[tuple[str, str], ...] = (
        ("Write the list with a dash before each line.", "\n".join(f"- {i}" for i in items)),
        ("Number the list.", "\n".join(f"{n}. {i}" for n, i in enumerate(items, 1))),
        ("Join the list with slashes.", " / ".join(items)),
        ("Join the list with bars.", " | ".join(items)),
        ("Turn the list round.", ", ".join(reversed(items))),
        ("Write the list as JSON.", json.dumps(items)),
        ("Which comes first?", items[0]),
        ("Which comes last?", items[-1]),
        ("Which comes second?", items[1] if len(items) > 1 else items[0]),
        ("How many are there?", words.NUMBER_WORDS[len(items)]),
        ("Leave out the first.", ", ".join(items[1:])),
        ("Leave out the last.", ", ".join(items[:-1])),
        ("Write each in brackets.", " ".join(f"({i})" for i in items)),
    )
    instruction, answer = rng.choice(forms)
    return [("user", f"{instruction}\n{given}"), ("assistant", answer or "none")]


def list_filter(rng: random.Random) -> Chat:
    pools = {
        "animals": words.ANIMALS,
        "foods": words.FOODS,
        "tools": words.TOOLS,
        "jobs": words.JOBS,
        "colours": words.COLOURS,
        "places": words.PLACES,
        "clothes": words.CLOTHES,
    }
    wanted, other = rng.sample(tuple(pools), 2)
    chosen = rng.sample(pools[wanted], rng.randint(1, 3))
    rest = [w for w in rng.sample(pools[other], rng.randint(1, 3)) if w not in pools[wanted]]
    mixed = chosen + rest
    rng.shuffle(mixed)
    kept = [word for word in mixed if word in chosen]
    instruction = rng.choice(("List the {}: ", "Which of these are {}? ", "Keep only the {}: "))
    return [
        ("user", instruction.format(wanted) + ", ".join(mixed)),
        ("assistant", ", ".join(kept)),
    ]


def replace_word(rng: random.Random) -> Chat:
    source = note(rng)
    field = rng.choice(list(source.facts))
    make: Callable[[random.Random], str] = {
        "name": lambda r: f"{words.first_name(r)} {words.surname(r)}",
        "thing": words.thing,
        "number": words.number,
        "town": words.town,
        "day": lambda r: r.choice(words.DAYS),
    }[field]
    old, new = source.facts[field], make(rng)
    instruction = rng.choice((f"Put {new} in place of {old}.", f"Replace {old} by {new}."))
    return _ask(rng, instruction, source.text, source.text.replace(old, new))


def spell(rng: random.Random) -> Chat:
    word = rng.choice((words.made_up_word, words.first_name, words.surname))(rng)
    if rng.random() < 0.3:
        word = rng.choice(words.OBJECTS + words.FOODS)
    form, answer = rng.choice((
        ("Spell {}.", "-".join(word.replace(" ", "_"))),
        ("First letter of {}?", word[0]),
        ("Write {} in capitals.", word.upper()),
        ("Write {} in small letters.", word.lower()),
        ("Write {} with a capital.", word.capitalize()),
    ))  # fmt: skip
    return [("user", form.format(word)), ("assistant", answer)]


def sentence_change(rng: random.Random) -> Chat:
    name, thing = words.first_name(rng), words.thing(rng)
    base, present, past = rng.choice(words.VERBS)
    now, then = f"{name} {present} the {thing}.", f"{name} {past} the {thing}."
    instruction, given, answer = rng.choice((
        ("Say it in the past.", now, then),
        ("Say it in the present.", then, now),
        ("Make it a question.", now, f"Does {name} {base} the {thing}?"),
        ("Make it a question.", then, f"Did {name} {base} the {thing}?"),
        ("Say the opposite.", now, f"{name} does not {base} the {thing}."),
        ("Who does it?", now, name),
        ("To what?", then, f"the {thing}"),
        ("Let it happen tomorrow.", now, f"Tomorrow {name} will {base} the {thing}."),
    ))  # fmt: skip
    return [("user", f"{instruction} {given}"), ("assistant", answer)]


# --- tables and memory ---------------------------------------------------------------------------


def look_up(rng: random.Random) -> Chat:
    keys = _items(rng, least=2, most=6)
    make = rng.choice((words.number, words.town, words.thing, words.made_up_word))
    table = {key: make(rng) for key in keys}
    form = rng.choice(("{} = {}", "{}: {}", "{} -> {}", "{} has {}"))
    lines = rng.choice(("\n", "; ", ", ")).join(form.format(*pair) for pair in table.items())
    key = rng.choice(keys)
    return [("user", f"{lines}\nWhat goes with {key}?"), ("assistant", table[key])]


def json_question(rng: random.Random) -> Chat:
    source = report(rng)
    record: dict[str, object] = dict(source.facts)
    record["count"] = rng.randint(1, 20)
    if rng.random() < 0.3:
        record["tags"] = rng.sample(words.COLOURS, 2)
    keys = list(record)
    rng.shuffle(keys)
    record = {key: record[key] for key in keys}
    key = rng.choice(keys)
    value = record[key]
    answer = value if isinstance(value, str) else json.dumps(value)
    if rng.random() < 0.3:
        answer = "\n".join(f"{k}: {v}" for k, v in record.items() if k != "tags")
        return [("user", f"Write as lines: {json.dumps(record)}"), ("assistant", answer)]
    return [("user", f"{json.dumps(record)}\nWhat is the {key}?"), ("assistant", answer)]


def make_json(rng: random.Random) -> Chat:
    pairs = {
        rng.choice((words.made_up_word(rng), rng.choice(words.OBJECTS))): rng.choice(
            (rng.randint(0, 999), words.town(rng), words.thing(rng), rng.random() < 0.5)
        )
        for _ in range(rng.randint(1, 4))
    }
    said = ", ".join(
        f"{k} is {json.dumps(v) if not isinstance(v, str) else v}" for k, v in pairs.items()
    )
    return [("user", f"As JSON: {said}"), ("assistant", json.dumps(pairs))]


def remember(rng: random.Random) -> Chat:
    name, place, thing = words.first_name(rng), words.town(rng), words.thing(rng)
    turns: Chat = [
        (
            "user",
            rng.choice((f"I am {name} from {place}.", f"My name is {name}. I live in {place}.")),
        ),
        ("assistant", f"Hello {name}."),
    ]
    if rng.random() < 0.6:
        turns += [
            ("user", f"I bought {words.with_article(thing)}."),
            ("assistant", rng.choice(("Good to know.", "I see.", "Fine."))),
        ]
        question, answer = rng.choice((("What did I buy?", thing), ("Where do I live?", place)))
    else:
        question, answer = rng.choice((("Who am I?", name), ("Where do I live?", place)))
    return [*turns, ("user", question), ("assistant", answer)]


# --- what everybody knows ------------------------------------------------------------------------


def fact(rng: random.Random) -> Chat:
    question, answer = rng.choice(words.FACTS)
    return [("user", question), ("assistant", answer)]


def small_knowledge(rng: random.Random) -> Chat:
    left, right = rng.choice(words.OPPOSITES)
    a, b = rng.randint(0, 30), rng.randint(0, 30)
    day = rng.randrange(7)
    month = rng.randrange(12)
    noun = rng.choice(words.ANIMALS + words.TOOLS + words.JOBS)
    kind = "animal" if noun in words.ANIMALS else "tool" if noun in words.TOOLS else "job"
    question, answer = rng.choice((
        (f"What is the opposite of {left}?", right),
        (f"{a} + {b} = ?", str(a + b)),
        (f"What is {a} plus {b}?", str(a + b)),
        (f"Which is more, {a} or {b}?", str(max(a, b))),
        (f"What day comes after {words.DAYS[day]}?", words.DAYS[(day + 1) % 7]),
        (f"What day comes before {words.DAYS[day]}?", words.DAYS[day - 1]),
        (f"What month comes after {words.MONTHS[month]}?", words.MONTHS[(month + 1) % 12]),
        (f"Is {words.with_article(noun)} an animal, a tool or a job?", kind),
        (f"Write {words.NUMBER_WORDS[a % 21]} in figures.", str(a % 21)),
        (f"Write {b % 21} as a word.", words.NUMBER_WORDS[b % 21]),
    ))  # fmt: skip
    return [("user", question), ("assistant", answer)]


def greeting(rng: random.Random) -> Chat:
    name = words.first_name(rng)
    question, answer = rng.choice((
        ("Hello!", "Hello! What can I do for you?"),
        ("Good morning.", "Good morning! How can I help?"),
        (f"Hi, I am {name}.", f"Hi {name}! What can I do for you?"),
        ("Who are you?", "I am a very small language model."),
        ("What can you do?", "I read short notes and do as you say."),
        ("Thank you.", "You are welcome."),
        ("Bye.", "Goodbye!"),
    ))  # fmt: skip
    return [("user", question), ("assistant", answer)]


# --- plain text ----------------------------------------------------------------------------------


def plain_text(rng: random.Random) -> str:
    maker: Callable[[random.Random], str] = rng.choice(
        (_story, _story, _asides, _notes, _records, _price_list, _key_values, _facts)
    )
    return maker(rng)


def _story(rng: random.Random) -> str:
    name, friend = words.first_name(rng), words.first_name(rng)
    place, thing, animal = rng.choice(words.PLACES), words.thing(rng), rng.choice(words.ANIMALS)
    _, present, past = rng.choice(words.VERBS)
    lines = [
        f"{name} was {words.with_article(rng.choice(words.JOBS))} in {words.town(rng)}.",
        f"One {rng.choice(words.DAYS)} {name} went to the {place}.",
        f"There was {words.with_article(animal)} near the {place}.",
        f"{name} {past} the {thing}.",
        f"{friend} was {rng.choice(words.FEELINGS)} because the {thing} was gone.",
        f"{friend} asked: Where is the {thing}?",
        f"{name} said: The {animal} has it.",
        f"They ate {rng.choice(words.FOODS)} and {rng.choice(words.FOODS)}.",
        f"In {rng.choice(words.MONTHS)} {friend} {present} nothing.",
        f"Then {name} gave {friend} {rng.choice(words.NUMBER_WORDS[2:])} coins.",
        f"After that {name} and {friend} were {rng.choice(words.FEELINGS)}.",
    ]
    start = rng.randrange(3)
    return " ".join(lines[start : start + rng.randint(4, 8)])


def _asides(rng: random.Random) -> str:
    return " ".join(words.aside(rng) for _ in range(rng.randint(2, 6)))


def _notes(rng: random.Random) -> str:
    return "\n".join(note(rng).text for _ in range(rng.randint(1, 3)))


def _records(rng: random.Random) -> str:
    fields = rng.sample(("name", "thing", "number", "town"), rng.randint(2, 4))
    rows = [report(rng).facts for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.5:
        separator = rng.choice((",", ";", " | "))
        return "\n".join(
            [separator.join(fields)] + [separator.join(row[f] for f in fields) for row in rows]
        )
    return "\n".join(json.dumps({field: row[field] for field in fields}) for row in rows)


def _price_list(rng: random.Random) -> str:
    return "\n".join(
        f"{item}: {rng.randint(1, 99)}.{rng.randrange(100):02d}" for item in _items(rng)
    )


def _key_values(rng: random.Random) -> str:
    source = note(rng)
    return "\n".join(f"{key}: {value}" for key, value in source.facts.items()) + f"\n{source.text}"


def _facts(rng: random.Random) -> str:
    return " ".join(answer for _, answer in rng.sample(words.FACTS, rng.randint(1, 4)))


# --- the mixture ---------------------------------------------------------------------------------

# Share of each kind among the chats.
CHATS: Sequence[tuple[Callable[[random.Random], Chat], float]] = (
    (one_field, 10),
    (fields_in_a_row, 9),
    (fields_in_a_form, 10),
    (fields_as_lines, 4),
    (fields_as_json, 8),
    (surname_first, 6),
    (topic_label, 7),
    (topic_code, 7),
    (yes_or_no, 4),
    (hurry_label, 4),
    (summary, 5),
    (reply, 5),
    (by_example, 8),
    (repeat, 8),
    (list_form, 6),
    (list_filter, 3),
    (replace_word, 4),
    (spell, 2),
    (sentence_change, 3),
    (look_up, 5),
    (json_question, 4),
    (make_json, 3),
    (remember, 2),
    (fact, 1),
    (small_knowledge, 3),
    (greeting, 0.5),
)
PLAIN_SHARE = 0.12
SYSTEM_SHARE = 0.4


def document(rng: random.Random) -> Document:
    """One document: a chat, or plain text."""
    if rng.random() < PLAIN_SHARE:
        return plain_text(rng)
    makers, weights = zip(*CHATS, strict=True)
    chat: Chat = rng.choices(makers, weights)[0](rng)
    if chat[0][0] != "system" and rng.random() < SYSTEM_SHARE:
        return [("system", _system_prompt(rng)), *chat]
    return chat


def _system_prompt(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(SYSTEM_PROMPTS)
    return rng.choice(EMPLOYERS).format(
        business=rng.choice(words.BUSINESSES), town=words.town(rng), name=words.surname(rng)
    )


def documents(seed: int, shard: int) -> Iterator[Document]:
    """Endless documents of one shard; the same seed and shard give the same documents."""
    rng = random.Random(f"eightgig-demo-{seed}-{shard}")
    while True:
        yield document(rng)


def render(source: Document) -> str:
    """The document as the model sees it: plain text, or turns as the chat template writes them."""
    if isinstance(source, str):
        return f"<bos>{source}<eos>"
    roles = {"assistant": "model"}
    turns = (f"<|turn>{roles.get(role, role)}\n{content}<turn|>\n" for role, content in source)
    return "<bos>" + "".join(turns)
