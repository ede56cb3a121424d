"""The words of the grammars: for each domain its slots, their values, and the wordings of each value."""

NAMES = (
    "Miller's Table,The Golden Oar,Saffron Lane,The Copper Pot,Harbour Lights,Olive and Thyme,The Old Mill,"
    "Lantern House,The Blue Heron,Juniper Court,Red Brick Kitchen,The Willow Tree,Fennel and Rye,The Quiet Fox,"
    "Marigold,The Brass Kettle,Northgate,The Seven Stairs,Amber Room,The Stone Bridge"
).split(",")
TOWNS = "Norwick,Ashford Bay,Elmstead,Kings Hollow,Redmoor,Saltmarsh,Thornby,Westerley,Birchwood,Lowfield".split(",")

# slot → value → its wordings. The slot-error rate looks for these words, so no wording of one value is part of a
# wording of another value of the same slot.
RESTAURANTS = {
    "eatType": {"pub": ["pub"], "restaurant": ["restaurant"], "coffee shop": ["coffee shop", "café"]},
    "food": {
        kind: [kind] for kind in ("Italian", "Chinese", "Indian", "French", "English", "Japanese", "Mexican", "Greek")
    },
    "priceRange": {
        "cheap": ["cheap", "inexpensive", "low-priced"],
        "moderate": ["moderately priced", "mid-priced", "averagely priced"],
        "high": ["costly", "high-priced", "upmarket"],
    },
    "customer rating": {
        "low": ["low customer rating", "poorly rated", "few good reviews"],
        "average": ["average customer rating", "rated as average", "mixed reviews"],
        "high": ["high customer rating", "highly rated", "excellent reviews"],
    },
    "area": {
        "riverside": ["by the river", "on the riverside", "along the river"],
        "city centre": ["in the city centre", "in the middle of town", "in the heart of the city"],
    },
    "familyFriendly": {
        "yes": ["family friendly", "welcomes families", "good for children"],
        "no": ["for adults only", "unsuitable for children", "does not admit children"],
    },
    "near": {name: [f"near {name}", f"close to {name}", f"not far from {name}"] for name in NAMES},
}
WEATHER = {
    "day": {day: [day] for day in "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()},
    "sky": {
        "clear": ["clear skies", "plenty of sunshine", "not a cloud"],
        "cloudy": ["grey clouds", "an overcast sky", "little sun"],
        "changing": ["sun and clouds in turn", "some sunny spells", "a changing sky"],
    },
    "temperature": {
        "cold": ["cold", "chilly", "near freezing"],
        "mild": ["mild", "pleasant", "agreeably warm"],
        "hot": ["hot", "sweltering", "baking"],
    },
    "wind": {
        "calm": ["hardly any wind", "no wind to speak of", "a calm air"],
        "breeze": ["a light breeze", "a gentle breeze", "some breeze"],
        "strong": ["strong wind", "stiff gusts", "a gale"],
    },
    "rain": {
        "none": ["dry", "without rain", "free of rain"],
        "showers": ["a few showers", "scattered showers", "a shower or two"],
        "heavy": ["heavy rain", "a downpour", "rain in torrents"],
    },
}
DOMAINS = {"restaurants": RESTAURANTS, "weather": WEATHER}
