"""The words that the demo model's pretraining text is made of. All of it is our own choice."""

from __future__ import annotations

import random


def word_list(text: str) -> tuple[str, ...]:
    """Split a block of text at white space, `_` standing for a space inside a word."""
    return tuple(word.replace("_", " ") for word in text.split())


FIRST_NAMES = word_list("""
    Ada Adam Agnes Aisha Alan Alba Alice Amir Amos Ana Anders Andrea Anna Anton Arlo Astrid Aya
    Bella Ben Bianca Boris Bruno Carla Cara Carl Cecil Chen Clara Cyrus Dana Daniel Dario David Dina
    Dora Edgar Edith Elias Elena Ella Emil Emma Enzo Erik Esther Eva Farid Felix Fiona Frank Freya
    George Gina Greta Hana Hannah Harold Hassan Helen Henry Hugo Ida Ines Ingrid Iris Isaac Ivan
    Jack Jamal Jana Jasper Jean Joan Jonas Josef Judith Julia Kai Karim Karl Kate Keiko Kofi Lars
    Laura Lea Leo Lena Lin Linus Louis Lucia Luke Mabel Maja Malik Marco Maria Marta Martin Mei
    Milan Mina Mira Mona Nadia Nils Nina Noah Nora Olga Oliver Omar Oscar Otto Paul Petra Pia Priya
    Rana Ravi Rita Robert Rosa Ruben Ruth Sam Samir Sara Simon Sofia Stella Sven Tara Theo Thomas
    Tilda Tom Tove Uma Ursula Vera Victor Viola Wanda Wei Willa Yara Yusuf Zara Zoe
""")

SURNAMES = word_list("""
    Abbot Adler Almeida Ambrose Andersen Arnold Baker Banks Barlow Bauer Becker Bell Berg Bishop
    Blake Bloom Boyd Brandt Brook Brown Burns Campos Carter Castle Chan Clark Cole Costa Cross Dale
    Dalton Davis Dawson Diaz Dixon Dunn Eaton Ellis Engel Evans Farrow Ferry Fischer Fisher Flint
    Forster Fox Franco Frost Fuller Garcia Gibson Grant Gray Green Gupta Hale Hansen Harper Hart
    Hayes Heller Hill Holm Holt Horn Howard Hughes Hunt Ibrahim Ivanov Jansen Jensen Jones Joshi
    Kaplan Keller Khan Kimura King Klein Knight Kumar Lang Larsen Lane Lee Lewis Lopez Lund Maas
    Marsh Martens Mason Meyer Miller Moore Moreno Morgan Murphy Myers Nash Nolan North Novak Nowak
    Okafor Olsen Ortega Owens Page Palmer Park Patel Pearce Perez Porter Price Quinn Ramos Reed Rice
    Rivera Roberts Rossi Rowe Russo Sato Schmidt Scott Shah Sharp Silva Singh Sloan Smith Snow Stone
    Sutton Swan Tanaka Taylor Thorne Turner Vance Vega Wagner Walker Walsh Ward Weber Webb Wells
    West White Wilson Winter Wolf Wood Wright Yilmaz Young Zeller Ziegler
""")

SYLLABLES = word_list("""
    ba be bi bo bra bru ca cha co da de di do dra du el en er fa fi flo fre ga ge gi go gra ha he hi
    ho in is ja jo ka ke ki ko kra la le li lo lu ma me mi mo mu na ne ni no nu on or pa pe pi po
    pra ra re ri ro ru sa se sha si so ste sto su ta te ti to tra tu un va ve vi vo wa we wi wo ya
    ye yo za ze zo
""")

NAME_ENDINGS = word_list(
    "n s l r ck rd nd st th m k ns ling son sen ton berg man ley by wick field"
)

TOWN_STARTS = word_list("""
    Ash Birch Black Bright Clay Cold Crow Deer Dun East Elm Fair Fern Gold Green Grey Haw High Iron
    King Lake Lime Long Maple Mill Moss New North Oak Old Pine Port Red River Rock Rose Salt Sand
    Silver South Spring Stan Stone Summer Thorn Wal West White Wind Wolf
""")

TOWN_ENDS = word_list("""
    born bridge brook bury by church cliff combe dale den field ford gate grove ham haven hill hurst
    land ley mere mont moor mouth pool port ridge shaw side stead stoke ton vale view ville well
    wick wood worth
""")

OBJECTS = word_list("""
    anchor apron armchair axe backpack bag ball barrel basket bath battery bed bell belt bench
    blanket blender boat book boot bottle bowl box bracelet bread_knife brick broom brush bucket
    button cabinet cable camera candle cap card carpet chain chair chest clock coat coin comb
    compass cooker cup curtain cushion desk dish door drawer dress drill drum fan feather fence
    flag flute fork frame fridge fryer garden_hose glass glove guitar hammer hat heater helmet hook
    iron jacket jar jug kettle key keyboard kite knife ladder lamp lantern lock locker map mat
    mattress mirror mixer mop motor mug nail necklace needle net notebook oven paddle paint pan
    pen pencil piano picture pillow pipe plate plug pot printer pump purse radio rake ring rope rug
    ruler sail saw scale scarf scissors screen screw shelf shirt shoe shovel shower sink skirt sofa
    spade speaker spoon spring stamp stool stove suitcase sweater switch table tap tape teapot
    telescope tent toaster tool_box torch towel toy_train tray trowel tub tyre umbrella vase violin
    wallet watch wheel whistle window wire
""")

QUALITIES = word_list("""
    black blue brown golden green grey orange pink purple red silver white yellow big clean cheap
    cosy dark dry empty fine flat fresh heavy high large light little long low modern narrow new
    old plain quiet rough round sharp short shiny simple small smooth soft solid square steel strong
    tall thick thin tiny warm wide wooden cotton glass leather plastic paper woollen copper folding
    double electric
""")

COLOURS = word_list("black blue brown green grey orange pink purple red white yellow")

ANIMALS = word_list("""
    ant bat bear bee bird camel cat chicken cow crab crow deer dog dolphin donkey duck eagle
    elephant fish fly fox frog goat goose hare hen horse lamb lion lizard mole monkey moth mouse
    otter owl ox parrot pig pigeon rabbit rat raven seal shark sheep snail snake spider squirrel
    swan tiger toad trout turtle whale wolf worm
""")

FOODS = word_list("""
    apple banana bean beetroot biscuit bread butter cabbage cake carrot cheese cherry chicken_soup
    chocolate corn cream cucumber egg fig flour garlic grape ham honey jam juice leek lemon lentil
    lettuce melon milk mushroom mustard noodle nut oat oil olive onion orange pasta pea peach pear
    pepper pie plum potato pumpkin radish rice salad salt sausage soup spinach sugar tea tomato
    turnip vinegar walnut yogurt
""")

PLANTS = word_list("""
    ash beech birch clover daisy elm fern fir grass ivy lily maple moss oak palm pine poppy reed
    rose tulip violet willow
""")

CLOTHES = word_list(
    "apron boot cap coat dress glove hat jacket scarf shirt shoe skirt sock sweater"
)

TOOLS = word_list(
    "axe brush chisel drill file hammer knife ladder pliers rake saw shovel spade wrench"
)

JOBS = word_list("""
    actor artist baker barber builder butcher carpenter chemist clerk cook dentist doctor driver
    farmer fisher gardener guard guide judge lawyer miner nurse painter pilot plumber poet porter
    postman potter printer sailor singer soldier tailor teacher waiter weaver writer
""")

PLACES = word_list("""
    bakery bank barn beach bridge castle cave church cinema farm field forest garage garden harbour
    hospital hotel house inn island kitchen lake library market mill mountain museum office park
    pier river road school shop square stable station street theatre tower town_hall valley village
    workshop
""")

BUSINESSES = word_list("""
    bakery bank cinema clinic farm_shop garage hotel ice_rink laundry library museum newspaper
    nursery pharmacy post_office printing_house restaurant school swimming_pool theatre town_hall
    train_company water_works zoo
""")

DAYS = word_list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

MONTHS = word_list("""
    January February March April May June July August September October November December
""")

NUMBER_WORDS = word_list("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
""")

FEELINGS = word_list(
    "angry calm curious glad happy hungry lonely nervous proud sad sleepy tired worried"
)

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("long", "short"),
    ("old", "new"),
    ("open", "closed"),
    ("early", "late"),
    ("light", "dark"),
    ("high", "low"),
    ("dry", "wet"),
    ("clean", "dirty"),
    ("full", "empty"),
    ("fast", "slow"),
    ("hard", "soft"),
    ("loud", "quiet"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("thick", "thin"),
    ("wide", "narrow"),
    ("young", "old"),
    ("up", "down"),
    ("left", "right"),
    ("first", "last"),
    ("day", "night"),
    ("summer", "winter"),
    ("yes", "no"),
    ("good", "bad"),
    ("heavy", "light"),
    ("inside", "outside"),
    ("before", "after"),
    ("buy", "sell"),
    ("push", "pull"),
    ("win", "lose"),
    ("start", "end"),
    ("happy", "sad"),
    ("cheap", "dear"),
)

VERBS = (
    ("carry", "carries", "carried"), ("clean", "cleans", "cleaned"), ("find", "finds", "found"),
    ("fix", "fixes", "fixed"), ("hide", "hides", "hid"), ("hold", "holds", "held"),
    ("keep", "keeps", "kept"), ("lift", "lifts", "lifted"), ("lose", "loses", "lost"),
    ("make", "makes", "made"), ("move", "moves", "moved"), ("need", "needs", "needed"),
    ("open", "opens", "opened"), ("paint", "paints", "painted"), ("pull", "pulls", "pulled"),
    ("push", "pushes", "pushed"), ("see", "sees", "saw"), ("sell", "sells", "sold"),
    ("take", "takes", "took"), ("want", "wants", "wanted"), ("wash", "washes", "washed"),
    ("break", "breaks", "broke"), ("bring", "brings", "brought"), ("buy", "buys", "bought"),
    ("draw", "draws", "drew"), ("like", "likes", "liked"), ("show", "shows", "showed"),
)  # fmt: skip

FACTS = (
    ("What colour is snow?", "Snow is white."),
    ("What colour is grass?", "Grass is green."),
    ("What colour is the sky on a clear day?", "The sky is blue."),
    ("What colour is coal?", "Coal is black."),
    ("What colour is a ripe lemon?", "A ripe lemon is yellow."),
    ("What do bees make?", "Bees make honey."),
    ("What does a cow give us?", "A cow gives us milk."),
    ("What does a hen lay?", "A hen lays eggs."),
    ("What do sheep give us?", "Sheep give us wool."),
    ("What do we use to cut wood?", "We cut wood with a saw."),
    ("What do we use to drive in a nail?", "We drive in a nail with a hammer."),
    ("What do we use to open a lock?", "We open a lock with a key."),
    ("What do we use to tell the time?", "We tell the time with a clock."),
    ("What do we use to keep off the rain?", "An umbrella keeps off the rain."),
    ("Where does a fish live?", "A fish lives in water."),
    ("Where do we borrow books?", "We borrow books in a library."),
    ("Where do we buy bread?", "We buy bread in a bakery."),
    ("Where do planes land?", "Planes land at an airport."),
    ("Where do trains stop?", "Trains stop at a station."),
    ("Who bakes bread?", "A baker bakes bread."),
    ("Who helps people who are ill?", "A doctor helps people who are ill."),
    ("Who teaches children?", "A teacher teaches children."),
    ("Who grows corn?", "A farmer grows corn."),
    ("Who flies a plane?", "A pilot flies a plane."),
    ("How many legs has a dog?", "A dog has four legs."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("How many legs has a bird?", "A bird has two legs."),
    ("How many days has a week?", "A week has seven days."),
    ("How many months has a year?", "A year has twelve months."),
    ("How many hours has a day?", "A day has twenty-four hours."),
    ("How many minutes has an hour?", "An hour has sixty minutes."),
    ("When do leaves fall?", "Leaves fall in autumn."),
    ("When does it snow?", "It snows in winter."),
    ("What is ice made of?", "Ice is made of water."),
    ("What is paper made of?", "Paper is made of wood."),
    ("What is bread made of?", "Bread is made of flour and water."),
    ("What is a young dog called?", "A young dog is called a puppy."),
    ("What is a young cat called?", "A young cat is called a kitten."),
    ("What is a young sheep called?", "A young sheep is called a lamb."),
    ("What is a young cow called?", "A young cow is called a calf."),
    ("What shines at night?", "The moon shines at night."),
    ("What shines by day?", "The sun shines by day."),
)


# Everyday sentences. `{first}` is a first name, `{count}` a small number, `{place}` a place.
ASIDES = (
    "I will come home right away.",
    "We had a long walk in the wind.",
    "It was cold this morning.",
    "My sister {first} sends her love.",
    "My uncle {first} always says so.",
    "I am {count} years old.",
    "We waited {count} minutes at the door.",
    "There were {count} people in the {place}.",
    "The children played outside until it was dark.",
    "She could not believe her eyes.",
    "He never told me about it.",
    "They have been friends for {count} years.",
    "I know that you are busy.",
    "Nothing else has changed here.",
    "Everything is fine at home.",
    "The bus was very full today.",
    "I often think about last summer.",
    "We should meet again soon.",
    "He looked at me and smiled.",
    "Please do not be angry with {first}.",
    "It rained all week.",
    "I have just come back from the {place}.",
    "My phone was broken, so I could not call.",
    "You were very kind to my mother.",
    "The road to the {place} is closed.",
    "I heard it on the radio.",
    "I was there with {first} and the dog.",
    "We are having a party next month.",
    "Sometimes I work at night.",
    "My desk is on the {count}th floor.",
    "I will be away for a while.",
    "The weather should be better tomorrow.",
    "Her answer made us laugh.",
    "Who would have thought it?",
    "I found your address in the paper.",
    "I wish you a good year.",
    "He runs faster than anybody.",
    "The food was good but the room was small.",
    "I am reading a book about the sea.",
    "Our team has won {count} times.",
    "Somebody must have seen it.",
    "Perhaps we are too early.",
    "Every day at noon I drink coffee.",
    "The light in the {place} was still on.",
    "My friend works there as a driver.",
    "I have never been so far north.",
    "Let me know what you think.",
    "You can reach me after five.",
    "This is the second time that I write.",
    "I hope you are well.",
    "Our train leaves at {count} o'clock.",
    "I took a picture of it.",
    "It is the same every spring.",
    "We want to move to the country.",
    "My hands were full.",
    "At first I did not understand.",
    "Is it true that the {place} will close?",
    "I have two daughters and a son.",
    "That was a surprise.",
    "Between us, the old one was better.",
    "Without help I would be lost.",
    "I put it under the stairs.",
    "We ride to the {place} every weekend.",
    "They asked me to try again.",
    "It could not be easier.",
    "The shop around the corner sells them, too.",
    "I have used it for {count} months.",
)


def aside(rng: random.Random) -> str:
    """An everyday sentence."""
    return rng.choice(ASIDES).format(
        first=first_name(rng), count=rng.randint(2, 19), place=rng.choice(PLACES)
    )


def made_up_word(rng: random.Random) -> str:
    """A word of two or three syllables that means nothing."""
    word = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 2, 3))))
    return word + rng.choice(NAME_ENDINGS) if rng.random() < 0.5 else word


def first_name(rng: random.Random) -> str:
    """A first name, made up one time in four."""
    return rng.choice(FIRST_NAMES) if rng.random() < 0.75 else made_up_word(rng).capitalize()


def surname(rng: random.Random) -> str:
    """A surname, made up one time in three."""
    return rng.choice(SURNAMES) if rng.random() < 0.67 else made_up_word(rng).capitalize()


def town(rng: random.Random) -> str:
    """A town's name."""
    if rng.random() < 0.3:
        return made_up_word(rng).capitalize()
    return rng.choice(TOWN_STARTS) + rng.choice(TOWN_ENDS)


def thing(rng: random.Random) -> str:
    """An object, often with a quality or a made-up maker before it."""
    chance = rng.random()
    if chance < 0.25:
        return rng.choice(OBJECTS)
    if chance < 0.65:
        return f"{rng.choice(QUALITIES)} {rng.choice(OBJECTS)}"
    if chance < 0.85:
        return f"{rng.choice(OBJECTS)} {rng.choice(OBJECTS)}"
    return f"{made_up_word(rng)} {rng.choice(OBJECTS)}"


def number(rng: random.Random, *, digits: int | None = None) -> str:
    """A number of two to six digits that does not start with zero."""
    count = digits or rng.choice((2, 3, 4, 4, 5, 5, 6))
    return str(rng.randrange(10 ** (count - 1), 10**count))


def with_article(noun: str) -> str:
    """The noun with `a` or `an` before it."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
