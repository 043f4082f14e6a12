"""The words the corpus is written with, and the words it must never make rules of.

``HELD_OUT`` words are kept to measure what the model does with words it never saw: they are
nowhere in the corpus, and several tokens long. Made-up words, and words spliced from halves of
English ones, teach the model to copy such words.
"""

from __future__ import annotations

from random import Random


def word_list(text: str) -> tuple[str, ...]:
    """The words of ``text``, which may be broken into lines."""
    return tuple(text.split())


HELD_OUT: frozenset[str] = frozenset(
    word_list(
        """
        badge blizzard burrito cabbage chimney cobra dagger fossil gadget gravel hazel kayak ladle
        limpet mustard nugget parsley pigeon pulley raisin satchel sandal thistle trumpet turnip
        walnut wombat zephyr
        """
    )
)

ENGLISH: tuple[str, ...] = word_list(
    """
    account address airport album alarm anchor animal answer apple apron arrow artist autumn award
    baker balcony banana banner barrel basket battery beach beacon bean bear bed bell bench berry
    bicycle bird biscuit blanket blue board boat book border bottle bowl box branch bread brick
    bridge broom brown brush bucket budget butter button cabin cabinet cable cactus cake calendar
    camel camera candle canoe canvas captain car carbon card carpet carrot castle cat cedar cellar
    chain chair chalk channel cheese cherry chicken church circle citrus city clay cliff clock
    cloth cloud coach coast coat coffee coin collar comet compass contract copper corner cotton
    courier cousin cradle crane cream credit cricket crown cup curtain cushion dancer deer delta
    desert desk diamond dinner doctor dog dolphin door dragon drawer dream drum duck eagle east
    echo editor egg elbow elm engine envelope evening falcon farmer feather fence fern festival
    field finger fire fish flag flame floor flour flower flute folder forest fork fountain fox
    frame friday frog fruit garage garden garlic gate ghost giraffe glass glove goat gold grain
    granite grape grass green guitar hammer harbor hat hawk heart hedge helmet heron hill honey
    horse hotel house ice inbox ink invoice iron island jacket jar jewel judge juice jungle kettle
    key king kitchen kite knife ladder lake lamp lantern laptop laser lawyer leaf leather lemon
    letter library lily lime linen lion lizard locker login lotus lunch machine magnet mango map
    maple marble market mask meadow medal melon menu mercury metal meteor mirror monday money
    monkey moon morning motor mountain mouse museum mushroom music nail napkin needle nest network
    night north nurse oak ocean office olive onion opera orange orbit orchid order otter oven owl
    oyster paint palace panda paper parcel parrot party password payment peach pebble pencil pepper
    permit phone photo piano picture pilot pine pink pirate planet plate plum pocket poet pond
    poplar printer prism prize pumpkin purple quartz queen rabbit radio rain rainbow raven receipt
    red rice ring river road robot rocket roof room rope rose ruby rubber saddle safety sailor
    salad salary salmon salt sand scarf school scissors scooter screen sea seat shadow sheep shelf
    shell ship shirt shoe shop siren sister slate snake snow soap sock sofa software soldier song
    soup south spider spoon spring square stable star station steel stone storm stove straw street
    student sugar summer sun sunday swan sword table tailor tax tea teacher teapot temple tennis
    tent theater thunder tiger tile timber toast tomato tool tower town toy tractor train tree
    tulip tunnel turtle umbrella uncle valley van velvet village vine violin voice wagon wallet
    warehouse water wave wheel whale wheat whistle white willow wind window wine winter wire wolf
    wood wool yacht yellow zebra zinc
    amber baggage bronze catering cobalt coral crimson delay indigo insurance ivory jade loyalty
    maroon ochre onyx parking passport pearl refund shuttle silver teal topaz upgrade violet visa
    wifi
    """
)

NAMES: tuple[str, ...] = word_list(
    """
    Ada Alba Anton Basil Bea Boris Bruno Carla Cleo Conrad Dora Edgar Edith Elias Emil Enid Fabio
    Flora Frida Gita Greta Hanna Hugo Ida Igor Ines Ivo Jonas Judith Kasper Kira Lars Lena Leo
    Lotte Luca Marek Mira Nadia Nils Nora Olga Oscar Paula Petra Rafael Rosa Rufus Selma Sven Tara
    Thea Tobias Ursula Vera Viktor Wanda Xenia Yara Zoe
    """
)
TOWNS: tuple[str, ...] = word_list(
    """
    Ashford Barwick Belmont Brantham Calder Camborne Carlow Coldbrook Dalton Denby Dunmore Eastwell
    Elmswood Fairhaven Farley Glenmoor Grafton Halden Harwick Hexham Holloway Kelby Kenfield Kirkby
    Langdale Lindale Lowmoor Marlow Melford Milbury Norwood Oakham Otley Penrose Radley Redhill
    Romford Rosedale Selby Silverton Stanmore Thornbury Tilbury Upton Walden Wexcombe Whitby Winslow
    """
)
PLACES: tuple[str, ...] = word_list(
    """
    ice hole gift grass pit prize sand rock treasure snow lava flag moss well chest path swamp nest
    water mud crack coin
    """
)
"""What lies on the squares of a small world."""
EDGES: tuple[str, ...] = word_list("shore hedge wall fence edge border")
"""What lies beyond its last squares, and cannot be stepped on."""
COLOURS: tuple[str, ...] = word_list(
    "red green blue purple yellow grey pink orange white black brown silver amber violet teal"
)
TERMS: tuple[str, ...] = word_list(
    """
    reverse first last rest trim rotate ends swap supported refuted mayor means Backwards Forwards
    left right up down west east ahead behind straight forward pickup toggle take use go carry
    nothing free none finish observation action history mission reasoning trajectory thought args
    next step doors gates chests cabinets need ball toy 0 1 2 3 4 5 6 7 8 9
    """
)

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys((*ENGLISH, *NAMES, *TOWNS, *TERMS, *PLACES, *EDGES, *COLOURS))
)
"""A token each."""

_ONSETS = word_list(
    "b c d f g h j k l m n p r s t v w z b c d f l m n p r s t br cr dr fl gr pl sh st tr"
)
_NUCLEI = word_list("a e i o u")
_CODAS = word_list("- - - - - - b d f g k l m n p r s t x l m n r s t ck nd nt rd rt ss st")


def made_up(rng: Random) -> str:
    """A word of two or three random syllables, such as ``"brandool"``."""
    while True:
        count = 2 if rng.random() < 0.8 else 3
        word = "".join(
            rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS).strip("-")
            for _ in range(count)
        )
        if word not in HELD_OUT:
            return word


def spliced(rng: Random) -> str:
    """The head of one English word and the tail of another, such as ``"lanket"``."""
    while True:
        head, tail = rng.choice(ENGLISH), rng.choice(ENGLISH)
        word = head[: max(2, len(head) // 2)] + tail[len(tail) // 2 :]
        if word not in HELD_OUT and word not in ENGLISH:
            return word


def distinct(rng: Random, count: int, english: float) -> list[str]:
    """``count`` different words, a share ``english`` of them from the English list."""
    words: dict[str, None] = {}
    while len(words) < count:
        draw = rng.random()
        if draw < english:
            words[rng.choice(ENGLISH)] = None
        elif draw < english + (1 - english) * 0.6:
            words[spliced(rng)] = None
        else:
            words[made_up(rng)] = None
    return list(words)
