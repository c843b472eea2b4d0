"""The words that captions of everyday photos use for things, colours, numbers and genders.

Written by hand for English captions, from the 1,300 commonest words of Flickr8k's training captions. What isn't listed
isn't judged. Like the synonym lists of CHAIR (Rohrbach et al., 2018, https://arxiv.org/abs/1809.02156), they put words
that can be said of the same thing together.
"""

# kind -> thing -> its words, singular; the plurals follow from `plural`. A word that stands for several things of one
# kind means any of them ("bike"), for things of several kinds one of each ("surfer").
THINGS = {
    "being": {
        "person": """person people man men woman women boy girl child children kid baby infant toddler lady guy
            gentleman male female adult teenager teen couple family someone somebody friend crowd audience player team
            teammate skateboarder skater snowboarder skier surfer swimmer diver biker bicyclist cyclist motorcyclist
            rider racer driver runner jogger climber hiker hunter walker wrestler boxer dancer performer musician
            guitarist singer goalie goalkeeper referee catcher batter pitcher bride groom mother father sister brother
            son daughter worker officer policeman policemen soldier cowboy clown cheerleader photographer fisherman
            fishermen student spectator onlooker pedestrian passenger kayaker rollerblader bather vendor owner jockey
            human youth youngster""",
        "dog": """dog puppy puppies doggy canine greyhound poodle retriever terrier collie shepherd bulldog pitbull
            doberman husky huskies dachshund labrador dalmatian hound mutt spaniel beagle rottweiler pug corgi
            boxer_dog""",
        "cat": "cat kitten kitty",
        "horse": "horse pony ponies bronco mule donkey",
        "bird": "bird duck geese goose swan pigeon seagull gull eagle hawk parrot chicken rooster",
        "cattle": "cow bull calf cattle ox buffalo",
        "sheep": "sheep lamb goat",
        "wild animal": "tiger lion bear monkey camel elephant deer zebra giraffe fox rabbit squirrel seal snake turtle",
        "fish": "fish dolphin whale shark",
    },
    "vehicle or board": {
        "bicycle": "bicycle bike cycle bmx biker bicyclist cyclist biking bicycling cycling unicycle tricycle",
        "motorcycle": """motorcycle motorbike motocross moped motorcyclist dirtbike atv quad four-wheeler biker bike
            bikes""",
        "skateboard": "skateboard skateboarder skateboarding skater skate_board",
        "skates": "skate rollerskate rollerblade rollerblader rollerblading skating skater",
        "snowboard": "snowboard snowboarder snowboarding",
        "skis": "ski skier skiing skied",
        "surfboard": "surfboard surfer surfing surf surfs bodyboard wakeboard windsurfer windsurfing",
        "boat": "boat canoe kayak raft rafting kayaking kayaker rowboat sailboat ship yacht paddle paddling",
        "car": "car truck vehicle jeep van taxi suv racecar automobile cart",
        "bus": "bus buses",
        "train": "train subway tram trolley",
        "sled": "sled sledding sledge toboggan tube inner_tube innertube tubing",
        "scooter": "scooter",
        "stroller": "stroller carriage wagon wheelchair",
        "airplane": "airplane plane jet aircraft helicopter",
    },
    "sport": {
        "football": "football rugby american_football quarterback",
        "soccer": "soccer goalie goalkeeper football",
        "basketball": "basketball dunk dribbles dribbling",
        "baseball": "baseball softball batter pitcher",
        "tennis": "tennis racket racquet",
        "hockey": "hockey lacrosse",
        "volleyball": "volleyball",
        "wrestling": "wrestling wrestler boxing boxer karate martial wrestle",
        "climbing": "climbing climber climb climbs rappelling rappel rock-climbing",
        "golf": "golf golfer",
        "gymnastics": "gymnast gymnastics cheerleader trampoline cartwheel",
    },
    "object": {
        "ball": "ball football basketball baseball softball volleyball soccer tennis rugby",
        "frisbee": "frisbee disc disk",
        "stick": "stick branch log twig",
        "toy": "toy doll balloon bubble kite hula_hoop stuffed_animal",
        "hurdle": "hurdle obstacle agility barrier",
        "swing": "swing hammock swinging",
        "slide": "slide",
        "rope": "rope leash cord harness",
        "guitar": "guitar instrument drum violin microphone piano",
        "camera": "camera photograph photographer",
        "phone": "phone cellphone telephone",
        "bag": "bag backpack purse suitcase",
        "umbrella": "umbrella parasol",
        "book": "book newspaper magazine",
        "bench": "bench chair seat couch sofa stool",
        "table": "table desk counter",
        "bed": "bed crib",
        "food": "food cake fruit ice_cream sandwich pizza meal banana apple candy",
        "drink": "drink beer bottle cup coffee soda wine",
        "sign": "sign banner flag poster billboard",
        "tent": "tent canopy",
        "flower": "flower tulip",
        "fountain": "fountain sprinkler hose",
        "camp fire": "fire firework candle",
    },
    "place": {
        "grass": "grass grassy field lawn meadow yard backyard park pasture grassland garden",
        "water": """water ocean sea lake river creek stream pond pool wave surf puddle waterfall rapids shore swim
            swims swimming swimmer bay""",
        "beach": "beach sand sandy shore shoreline coast seaside dune desert",
        "snow": "snow snowy snow-covered snowbank snowball ice icy",
        "street": "street road sidewalk pavement city crosswalk intersection alley urban highway curb",
        "path": "path trail track dirt course walkway",
        "building": "building house structure skyscraper church tower storefront store shop",
        "wall": "wall brick graffiti",
        "fence": "fence gate railing rail",
        "tree": "tree forest woods wood jungle bush wooded leaves",
        "rock": "rock rocky boulder cliff stone ledge mountain mountaintop mountainside canyon peak hill hillside",
        "stairs": "stair staircase",
        "ramp": "ramp half-pipe halfpipe skatepark",
        "stage": "stage concert",
        "room": "room kitchen indoors inside floor carpet restaurant gym bedroom bathroom office",
        "playground": "playground carnival amusement",
        "bridge": "bridge dock pier",
        "court": "court stadium arena rink",
    },
    "clothing": {
        "shirt": "shirt t-shirt tshirt tee jersey tank_top blouse sweatshirt sweater hoodie uniform",
        "jacket": "jacket coat parka hoodie sweater vest sweatshirt",
        "dress": "dress gown skirt",
        "trousers": "pants jeans trousers shorts trunks",
        "hat": "hat cap helmet hood beanie bandanna headband headscarf",
        "swimwear": "swimsuit bikini wetsuit trunks bathing_suit",
        "suit": "suit tuxedo costume outfit",
        "glasses": "glasses sunglasses goggles",
    },
}

# Things that are hardly told apart on a photo, or that come together: one supports the other.
RELATED = (
    *(("beach", "water"), ("wall", "building"), ("wall", "room"), ("street", "path"), ("street", "building")),
    *(("rock", "climbing"), ("stroller", "bicycle"), ("skates", "skateboard"), ("bench", "table")),
)

# Judged as a category, not as a thing of its own: a boy is a person.
CHILDREN = "child children kid boy girl baby infant toddler youngster"
# Words for any thing of a kind: they support every one and are supported by every one.
GENERAL = {"being": "animal pet", "vehicle or board": "board", "sport": "game sport match"}

# Colours that people call the same thing by share a family; a word may belong to two.
COLORS = {
    "black": "black",
    "white": "white cream",
    "grey": "grey gray silver",
    "brown": "brown tan beige golden blond blonde",
    "red": "red maroon",
    "orange": "orange",
    "yellow": "yellow gold golden",
    "green": "green",
    "blue": "blue navy turquoise",
    "purple": "purple violet lavender",
    "pink": "pink",
}

# Beings that are counted, with the words that mean several by themselves.
COUNTED = ("person", "dog")
COLLECTIVE = {"people": 2, "couple": 2, "family": 2, "team": 2, "crowd": 3, "audience": 3}
NUMBERS = {
    **{"a": 1, "an": 1, "one": 1, "single": 1, "another": 1, "two": 2, "2": 2, "both": 2, "three": 3, "3": 3},
    **{"four": 4, "4": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
}
# "a pair of", "a group of": at least so many.
GROUPS = {
    **{"couple": (2, 2), "pair": (2, 2), "trio": (3, 3), "group": (2, None), "several": (3, None)},
    **{"many": (3, None), "crowd": (3, None), "bunch": (3, None), "team": (2, None), "few": (2, None)},
    **{"some": (2, None), "pack": (2, None)},
}

GENDERS = {
    "male": """man men boy guy gentleman gentlemen male father son brother husband groom policeman policemen fisherman
        fishermen businessman""",
    "female": "woman women girl lady ladies female mother daughter sister bride wife businesswoman",
}


def plural(word: str) -> str:
    """The regular plural of an English noun."""
    if word.endswith("y") and word[-2:-1] not in "aeou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "sh", "ch", "x")) else "s")


def forms(words: str) -> list[str]:
    """Each word of a list with its plural; words of two parts are written with `_`."""
    return [form.replace("_", " ") for word in words.split() for form in (word, plural(word))]


def _index(lists: dict[str, str], plurals: bool = True) -> dict[str, set[str]]:
    index: dict[str, set[str]] = {}
    for name, words in lists.items():
        for word in forms(words) if plurals else words.split():
            index.setdefault(word, set()).add(name)
    return index


KIND_OF = {thing: kind for kind, things in THINGS.items() for thing in things}
THINGS_OF_WORD = _index({thing: words for things in THINGS.values() for thing, words in things.items()})
GENERAL_OF_WORD = _index(GENERAL)
COLORS_OF_WORD = _index(COLORS, plurals=False)
GENDER_OF_WORD = {word: name for name, words in GENDERS.items() for word in forms(words)}
CHILD_WORDS = set(forms(CHILDREN))
