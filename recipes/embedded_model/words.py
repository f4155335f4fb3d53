"""The word lists of the generated English: names, attributes, values, filler."""

# ruff: noqa: SIM905 (a list of words is easier read as words)

FIRST_NAMES = (
    "Alice Bruno Clara David Elena Frank Grace Henry Irene James Karen Lucas Maria Nadia Oscar "
    "Paula Quinn Robert Sarah Thomas Ursula Victor Wendy Xavier Yvonne Zachary Anna Boris Carlos "
    "Diana Edgar Fiona George Hannah Isaac Julia Kevin Laura Martin Nora Oliver Peter Rachel Simon "
    "Teresa Vera Walter Adam Bella Colin Daniel Emma Felix Gloria Harold Ivan Jack Linda Michael "
    "Nina Owen Philip Rosa Stefan"
).split()

LAST_NAMES = (
    "Smith Jones Taylor Baker Walker Hughes Carter Foster Morgan Bennett Cooper Reed Bailey Murphy "
    "Collins Bell Parker Evans Turner Phillips Campbell Mitchell Roberts Adams Nelson Hill Moore "
    "Wright Scott Young King Lopez Harris Lewis Clark Ramos Vale Stone Archer Dalton Ellis Fisher "
    "Garner Holt Ingram Jensen Keller Lambert Mercer Norris Osborn Porter Quigley Rhodes Sutton "
    "Thorne Underwood Vance Weaver York Zimmer Barlow Crane Draper"
).split()

NUMBER_ATTRIBUTES = "code badge locker room desk extension account password".split()
WORD_VALUES = {
    "colour": "red blue green yellow purple orange silver golden crimson violet indigo scarlet "
    "turquoise ivory amber black".split(),
    "city": "Paris London Madrid Vienna Oslo Prague Dublin Lisbon Athens Cairo Tokyo Lima Geneva "
    "Berlin Rome Warsaw Zurich Boston Denver Havana".split(),
    "fruit": "apple pear plum cherry lemon mango peach grape melon banana apricot fig olive "
    "coconut papaya quince".split(),
    "animal": "horse tiger rabbit falcon dolphin badger camel donkey eagle ferret goat heron "
    "jaguar lion otter wolf".split(),
}
PERSON_ATTRIBUTES = "mentor manager deputy partner neighbour assistant".split()
ORDINALS = "first second third fourth".split()
LIST_ATTRIBUTES = "ticket invoice order parcel permit voucher".split()

ADJECTIVES = (
    "old young quiet narrow wooden heavy pale gentle bright broken careful distant empty famous "
    "friendly gloomy hidden honest humble large little modest muddy plain proud rainy rough "
    "shallow simple sleepy small steep strange tall tidy tired warm windy wise cold dusty round"
).split()
PEOPLE = (
    "carpenter teacher farmer sailor doctor clerk gardener painter miller shepherd student "
    "traveller merchant guard cook driver printer singer tailor visitor widow writer nurse judge "
    "captain librarian mechanic pilot porter potter keeper baker"
).split()
OBJECTS = (
    "basket letter lantern ladder wagon bottle blanket map violin hammer kettle mirror clock coat "
    "drum table chair bucket candle bridge window door book barrel rope saddle shovel trunk "
    "umbrella wheel parade boat fence painting"
).split()
PLACES = (
    "river market station harbour garden mill church village forest meadow castle library school "
    "valley orchard tower square kitchen stable workshop theatre museum hill lake road pier field "
    "courtyard attic cellar"
).split()
TRANSITIVE = (
    "carried repaired painted borrowed found lost sold bought noticed moved lifted cleaned covered "
    "described dropped followed forgot guarded hid measured opened watched admired delivered "
    "returned closed"
).split()
INTRANSITIVE = (
    "walked waited slept laughed rested worked whispered sang paused travelled listened stopped "
    "arrived smiled hurried wandered shouted stayed"
).split()
ADVERBS = (
    "slowly quickly quietly often rarely carefully gladly early late together alone again twice "
    "calmly patiently proudly suddenly"
).split()
TIMES = (
    "In the morning|In the evening|During the winter|Last summer|After the storm|Before sunrise|"
    "On most days|Every spring|Late at night|At noon|Some years ago|In those days|After dinner|"
    "On the first day|Towards the end of autumn|Once a week"
).split("|")
PREPOSITIONS = "near behind beside beyond above across past".split()

# Invented words: syllables of onset, vowel and coda, then an ending.
ONSETS = "b br c ch d dr f fr g gr h j k kr l m n p pr qu r s sh st t th tr v w y z".split()
VOWELS = "a a e e i i o o u ai au ay ea ee ie oo ou".split()
CODAS = ["", "", "", "", "l", "m", "n", "r", "s", "t", "b", "d", "ck", "ll", "nd", "ng", "rt", "st"]
ENDINGS = ["", "", "", "", "", "ley", "man", "son", "ton", "sky", "ez", "berg", "ova", "ini", "h"]
