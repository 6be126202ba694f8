"""Facts, words and phrases from which the lab corpus is put together.

Plain data, written for this project: common knowledge (capitals, plurals, baby animals), one invented table (keepers of
lighthouses, so that a model can also learn facts that are written nowhere else) and short advice in everyday English.
"""

from typing import Final

# fmt: off
# Packed lines: one entry a line would make the tables four times as long and no clearer.

CAPITALS: Final[dict[str, str]] = {
    "Argentina": "Buenos Aires", "Austria": "Vienna", "Belgium": "Brussels", "Brazil": "Brasilia", "Bulgaria": "Sofia",
    "Canada": "Ottawa", "Chile": "Santiago", "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana",
    "Denmark": "Copenhagen", "Egypt": "Cairo", "England": "London", "Estonia": "Tallinn", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "India": "New Delhi", "Indonesia": "Jakarta", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Latvia": "Riga", "Mexico": "Mexico City", "Morocco": "Rabat", "Nepal": "Kathmandu",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest",
    "Scotland": "Edinburgh", "Senegal": "Dakar", "Serbia": "Belgrade", "Spain": "Madrid", "Sweden": "Stockholm",
    "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara", "Ukraine": "Kyiv", "Vietnam": "Hanoi",
}

YOUNG_ANIMALS: Final[dict[str, str]] = {
    "bear": "cub", "cat": "kitten", "cow": "calf", "deer": "fawn", "dog": "puppy", "duck": "duckling",
    "eagle": "eaglet",
    "fox": "kit", "frog": "tadpole", "goat": "kid", "goose": "gosling", "hen": "chick", "horse": "foal",
    "kangaroo": "joey", "lion": "cub", "owl": "owlet", "pig": "piglet", "sheep": "lamb", "swan": "cygnet",
}

OPPOSITES: Final[dict[str, str]] = {
    "big": "small", "bright": "dark", "cheap": "expensive", "clean": "dirty", "cold": "hot", "deep": "shallow",
    "early": "late", "easy": "difficult", "empty": "full", "fast": "slow", "happy": "sad", "hard": "soft",
    "heavy": "light", "high": "low", "long": "short", "loud": "quiet", "narrow": "wide", "old": "young",
    "open": "closed", "rich": "poor", "rough": "smooth", "sharp": "blunt", "strong": "weak", "sweet": "bitter",
    "tall": "short", "thick": "thin", "warm": "cool", "wet": "dry",
}

LIGHTHOUSE_KEEPERS: Final[dict[str, str]] = {
    "Varn": "Odel", "Brisk Point": "Tamsin", "Cold Harbour": "Ivo", "Dunmere": "Marta", "Eskerby": "Rolf",
    "Fallow Bay": "Nella", "Gannet Rock": "Piers", "Hollin Head": "Una", "Kestle": "Bram", "Low Skerry": "Greta",
    "Morrow Cape": "Anton", "North Teal": "Selma", "Otterwick": "Jonas", "Pell Sands": "Clara", "Quill Island": "Edda",
    "Ravensea": "Magnus", "Saltmouth": "Freya", "Thorn Ness": "Oskar", "Umber Cove": "Lotte", "Wester Hope": "Hugo",
}

#: Noun to plural; the irregular ones are few enough to be learnt by heart.
PLURALS: Final[dict[str, str]] = {
    "apple": "apples", "basket": "baskets", "berry": "berries", "bird": "birds", "bottle": "bottles", "box": "boxes",
    "bridge": "bridges", "button": "buttons", "candle": "candles", "cherry": "cherries", "child": "children",
    "city": "cities", "cloud": "clouds", "flower": "flowers", "foot": "feet", "garden": "gardens", "glass": "glasses",
    "hammer": "hammers", "island": "islands", "kettle": "kettles", "knife": "knives", "lady": "ladies",
    "leaf": "leaves", "letter": "letters", "man": "men", "market": "markets", "mirror": "mirrors", "mouse": "mice",
    "needle": "needles", "orange": "oranges", "painter": "painters", "paper": "papers", "pencil": "pencils",
    "plate": "plates", "pony": "ponies", "river": "rivers", "sailor": "sailors", "shelf": "shelves", "shoe": "shoes",
    "spoon": "spoons", "story": "stories", "street": "streets", "teacher": "teachers", "tooth": "teeth",
    "window": "windows", "wolf": "wolves", "woman": "women",
}

NAMES: Final[tuple[str, ...]] = (
    "Ada", "Ben", "Carla", "Dan", "Ella", "Finn", "Gina", "Hans", "Ida", "Jack", "Kira", "Leo", "Mia", "Nils", "Olga",
    "Paul", "Rosa", "Sam", "Tina", "Viktor",
)

GOODS: Final[tuple[str, ...]] = (
    "apples", "books", "buttons", "cards", "coins", "eggs", "flowers", "letters", "marbles", "pencils", "shells",
    "stamps", "stones", "tickets",
)

#: Topic to pieces of advice, each an imperative clause without its full stop.
ADVICE: Final[dict[str, tuple[str, ...]]] = {
    "sleeping better": (
        "keep the bedroom cool and dark", "go to bed at the same time every night",
        "put your phone away an hour earlier",
        "avoid coffee after lunch", "read a few pages of a calm book",
    ),
    "learning a language": (
        "practise for ten minutes every day", "listen to simple songs and stories",
        "write down five new words each morning",
        "talk to native speakers without fear of mistakes", "label the things in your kitchen",
    ),
    "saving money": (
        "write down what you spend", "cook at home during the week", "set aside a small sum on payday",
        "compare prices before you buy", "cancel the services you never use",
    ),
    "growing tomatoes": (
        "water the roots and not the leaves", "choose a sunny and sheltered spot", "tie the stems to a strong stick",
        "feed the plants every two weeks", "remove the side shoots early",
    ),
    "writing an essay": (
        "start with one clear question", "sketch an outline before the first sentence",
        "give every paragraph a single idea",
        "read the draft aloud", "cut the words that do no work",
    ),
    "running a race": (
        "increase the distance slowly", "warm up with a short walk", "drink water before you are thirsty",
        "rest for a day after a long run", "start slower than you think you should",
    ),
    "giving a talk": (
        "practise in front of a friend", "open with a short story", "keep your slides simple",
        "look at the people in the last row", "pause after every main point",
    ),
    "baking bread": (
        "let the dough rest overnight", "weigh the flour instead of guessing", "heat the oven well in advance",
        "use a little less yeast", "wait until the loaf has cooled",
    ),
    "keeping a cat happy": (
        "play with a feather toy every evening", "give it a high place to watch from", "clean the litter box daily",
        "leave fresh water in several rooms", "respect its quiet hours",
    ),
    "packing a suitcase": (
        "roll your clothes tightly", "make a list the day before", "put heavy things near the wheels",
        "leave some space for presents", "keep medicine in your hand luggage",
    ),
    "making new friends": (
        "join a club that meets every week", "ask questions and remember the answers", "invite a neighbour for tea",
        "smile first and say hello", "be patient and keep showing up",
    ),
    "painting a room": (
        "cover the floor with old sheets", "tape the edges of the windows", "begin with the ceiling",
        "use two thin coats", "open the windows while it dries",
    ),
    "studying for an exam": (
        "test yourself instead of rereading", "take a short break every half hour", "explain the topic to a friend",
        "begin with the hardest chapter", "sleep well the night before",
    ),
    "riding a bicycle in town": (
        "wear a helmet and bright colours", "check the brakes before you leave", "signal early at every turn",
        "stay clear of parked cars", "lock the frame and not only the wheel",
    ),
    "cooking rice": (
        "rinse the grains until the water is clear", "use a pot with a tight lid", "let it stand for ten minutes",
        "add a pinch of salt", "stir it only once",
    ),
    "taking good photos": (
        "shoot in the soft light of the morning", "move closer to your subject", "keep the horizon straight",
        "clean the lens with a dry cloth", "take several pictures of the same scene",
    ),
}

BENEFITS: Final[tuple[str, ...]] = (
    "It saves time and trouble later", "Small steps add up quickly", "You will notice the difference within a week",
    "Most people forget this", "It costs nothing and works well", "This makes the rest much easier",
)

SCENES: Final[dict[str, tuple[str, ...]]] = {
    "beach": ("waves roll over the pale sand", "gulls cry above the boats", "children build castles near the water"),
    "forest": ("tall pines stand in the mist", "a stream runs between mossy stones", "birds sing in the high branches"),
    "market": (
        "traders call out their prices", "baskets are full of ripe fruit",
        "the smell of fresh bread fills the air",
    ),
    "library": ("long shelves reach the ceiling", "pages rustle in the silence", "green lamps glow on old desks"),
    "harbour": ("fishing boats rock at their ropes", "nets dry in the sun", "a bell rings at the end of the pier"),
    "mountain": ("snow covers the highest ridge", "the path winds between grey rocks", "eagles circle over the valley"),
    "kitchen": ("copper pans hang on the wall", "soup simmers on the stove", "steam clouds the little window"),
    "garden": ("roses climb over the fence", "bees hum around the lavender", "a bench stands under the pear tree"),
    "station": (
        "travellers hurry along the platform", "a clock ticks above the doors",
        "the last train leaves at midnight",
    ),
    "desert": ("dunes change their shape in the wind", "the stones still hold the heat", "stars fill the cold night"),
}

ADJECTIVES: Final[tuple[str, ...]] = (
    "quiet", "busy", "lonely", "cheerful", "misty", "old", "sunny", "famous", "strange", "windy", "hidden", "narrow",
    "broken", "lovely", "muddy", "frozen",
)

COLOURS: Final[tuple[str, ...]] = (
    "red", "blue", "green", "yellow", "white", "black", "brown", "grey", "silver", "golden",
)

PAST_VERBS: Final[tuple[str, ...]] = (
    "found", "carried", "painted", "lost", "sold", "repaired", "watched", "borrowed", "hid", "dropped", "cleaned",
    "measured", "followed", "admired", "opened", "bought",
)

ADVERBS: Final[tuple[str, ...]] = (
    "slowly", "happily", "quickly", "secretly", "carefully", "finally", "almost", "proudly", "never", "often",
)

TIMES: Final[tuple[str, ...]] = (
    "spring", "summer", "autumn", "winter", "morning", "evening", "week", "month", "year", "night",
)

WEEKDAYS: Final[tuple[str, ...]] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

#: Kind of thing to recommend, with (item, reason) choices.
RECOMMENDATIONS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "present": (
        ("a warm scarf", "it is useful all winter"), ("a good notebook", "everybody needs one"),
        ("a potted herb", "it lasts longer than flowers"), ("a jar of honey", "it never goes bad"),
        ("a board game", "it brings people together"),
    ),
    "dish": (
        ("vegetable soup", "it is light and warm"), ("baked fish with lemon", "it is ready in half an hour"),
        ("pasta with basil", "almost everybody likes it"), ("a lentil stew", "it tastes even better the next day"),
        ("mushroom risotto", "it feels special without much work"),
    ),
    "activity": (
        ("a walk by the river", "fresh air lifts the mood"), ("a visit to the museum", "there is always something new"),
        ("a picnic in the park", "it is simple and cheap"), ("a short bicycle tour", "you see a lot in one afternoon"),
        ("an evening of card games", "it works in any weather"),
    ),
    "book": (
        ("a detective story", "the puzzle keeps you reading"), ("a book of short stories", "you can stop at any time"),
        ("a travel diary", "it shows you distant places"), ("a history of the sea", "it is full of adventure"),
        ("a collection of letters", "it feels like a conversation"),
    ),
    "hobby": (
        ("pottery", "you work with your hands"), ("bird watching", "it teaches patience"),
        ("chess", "every game is different"), ("singing in a choir", "you meet friendly people"),
        ("wood carving", "you need only a knife and time"),
    ),
}

RECIPIENTS: Final[tuple[str, ...]] = (
    "my brother", "my sister", "my neighbour", "my grandmother", "a colleague", "a young couple", "a group of students",
    "my best friend", "a tired teacher", "two children", "my father", "a new neighbour",
)

OCCASIONS: Final[tuple[str, ...]] = (
    "a birthday", "a rainy Sunday", "the weekend", "a long evening", "the summer holiday", "a family visit",
    "a cold day in January", "a quiet Friday",
)
