"""English for what the table calls things: names made plain, and noun phrases."""

from __future__ import annotations

import re

_PHRASES = {
    "kiss": "kissing couple",
    "zzz": "sleeping sign zzz",
    "breast-feeding": "breast-feeding woman",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star-struck": "star-struck face",
    "high voltage": "lightning bolt",
    "hourglass not done": "hourglass with running sand",
    "hourglass done": "hourglass",
    "wood": "wooden log",
    "hundred points": "red number hundred",
    "fire": "flame",
    "selfie": "hand taking a selfie",
    "nail polish": "hand with nail polish",
    "horse racing": "racing horse with a jockey",
    "love-you gesture": "love-you hand",
    "vulcan salute": "vulcan salute hand",
    "face in clouds": "face in the clouds",
    "seat": "passenger seat",
    "collision": "explosion",
    "dizzy": "dizzy star",
    "dashing away": "puff of dust",
    "tennis": "tennis racket with a ball",
    "bowling": "bowling ball with pins",
    "cricket game": "cricket bat with a ball",
    "field hockey": "field hockey stick with a ball",
    "ice hockey": "ice hockey stick with a puck",
    "lacrosse": "lacrosse stick with a ball",
    "ping pong": "ping pong paddle with a ball",
    "badminton": "badminton racket with a shuttlecock",
    "locked": "closed padlock",
    "unlocked": "open padlock",
    "locked with pen": "closed padlock with a pen",
    "locked with key": "closed padlock with a key",
    "construction": "construction barrier",
    "performing arts": "pair of theatre masks",
    "flower playing cards": "flower playing card",
    "headphone": "pair of headphones",
    "building construction": "building under construction",
    "camping": "camping tent by trees",
    "foggy": "bridge in the fog",
    "wedding": "wedding chapel",
    "light rail": "light rail train",
    "metro": "metro train",
    "airplane arrival": "airplane landing",
    "airplane departure": "airplane taking off",
    "globe showing americas": "globe showing the americas",
    "globe showing asia-australia": "globe showing asia and australia",
    "globe showing europe-africa": "globe showing europe and africa",
    "flag in hole": "golf hole with a flag",
    "joker": "joker card",
    "chart increasing": "rising chart",
    "chart increasing with yen": "rising chart with a yen sign",
    "chart decreasing": "falling chart",
    "link": "chain link",
    "pick": "pickaxe",
    "money with wings": "banknote with wings",
    "speaker high volume": "speaker at high volume",
    "speaker medium volume": "speaker at medium volume",
    "speaker low volume": "speaker at low volume",
    "cooked rice": "bowl of cooked rice",
    "curry rice": "plate of curry rice",
    "shaved ice": "bowl of shaved ice",
    "canned food": "can of food",
    "cooking": "frying pan with an egg",
    "pouring liquid": "glass pouring out water",
    "baguette bread": "baguette",
    "soft ice cream": "soft ice cream cone",
    "meat on bone": "piece of meat on a bone",
    "candy": "piece of candy",
    "ice": "ice cube",
    "mate": "cup of mate",
    "index pointing up": "hand with the index finger pointing up",
    "index pointing at the viewer": "hand pointing at the viewer",
    "backhand index pointing up": "hand seen from the back pointing up",
    "backhand index pointing down": "hand seen from the back pointing down",
    "backhand index pointing left": "hand seen from the back pointing left",
    "backhand index pointing right": "hand seen from the back pointing right",
    "sign of the horns": "hand making the sign of the horns",
    "raised back of hand": "back of a raised hand",
    "person in lotus position": "person in the lotus position",
    "man in lotus position": "man in the lotus position",
    "woman in lotus position": "woman in the lotus position",
    "leaf fluttering in wind": "leaf fluttering in the wind",
    "umbrella on ground": "umbrella on the ground",
    "face without mouth": "face without a mouth",
    "face with hand over mouth": "face with a hand over its mouth",
    "face with open eyes and hand over mouth": "face with open eyes and a hand over its mouth",
    "face with tongue": "face with its tongue out",
}
_BARE = (
    "fog|milky way|sun|santa claus|mrs. claus|mx claus|rice|bread|cheese|bacon|spaghetti|popcorn|"
    "mount fuji|butter|salt|garlic|broccoli|honey|sushi|money|sake|seaweed|luggage|thread|yarn|"
    "dna|soap|sand"
)
_THE = ("sun", "milky way", "kaaba", "statue of liberty", "tokyo tower")
_HEAD_ENDS = (
    "with|without|of|in|on|behind|from|to|and|blowing|over|for|under|at|by|wearing|above|savoring"
)
_WANTS_ARTICLE = re.compile(  # "man getting massage": telegram style
    r"\b(getting|raising|tipping|feeding|rowing|bouncing|taking|wearing|with|without|in|on|over"
    r"|behind) "
    r"(massage|haircut|hand|baby|boat|ball|bath|turban|veil|white cane|motorized wheelchair"
    r"|manual wheelchair|tuxedo|headscarf|skullcap|crown|steamy room|suit|medical mask|thermometer"
    r"|head-bandage|halo|tear|monocle|cowboy hat|wry smile|ribbon|heart|hearing aid|flash|handle"
    r"|raised eyebrow|diagonal mouth|peeking eye|popping cork|face|garden|umbrella|spoon|straw"
    r"|plate|swirl|slash|arrow|curl|ballot|decorative cover|lowered flag|raised flag|open mouth"
    r"|cloud|large cloud|small cloud|rain cloud|speech bubble|bone)\b(?!-)"
)
_PLAIN = str.maketrans({"\u2019": "'", "\u201c": "", "\u201d": "", "!": "", "é": "e", "ñ": "n"})


def clean(annotation: str) -> str:
    """Lower case, straight apostrophes, no bracketed remarks, details after a colon in words."""
    text = re.sub(r"\s*\(.*?\)", "", annotation.lower()).translate(_PLAIN).strip()
    subject, _, detail = text.partition(": ")
    if not detail:
        return text
    if subject == "family":
        each = [f"{article(member)} {member}" for member in detail.split(", ")]
        return f"family of {', '.join(each[:-1])} and {each[-1]}"
    if subject == "kiss":
        return f"kiss of {' and '.join(detail.split(', '))}"
    if subject == "couple with heart":
        return f"couple of {' and '.join(f'a {who}' for who in detail.split(', '))} with heart"
    if detail == "bald":
        return f"bald {subject}"
    if detail.startswith("facing"):
        return f"{subject} {detail}"
    return f"{subject} with {'a beard' if detail == 'beard' else detail}"


def phrase(name: str) -> tuple[str, bool]:
    """(noun phrase with its article, whether it is a plural) of a cleaned name."""
    if name.endswith(("o'clock", "-thirty")):
        return "a clock", False  # the hands of the animated ones turn
    text = _PHRASES.get(name) or _WANTS_ARTICLE.sub(_with_article, name)
    if text.startswith("kiss of "):
        text = f"kissing {text.removeprefix('kiss of ')}"
    if text in _THE:
        return f"the {text}", False
    plural = _is_plural(text)
    if plural or re.fullmatch(_BARE, text):
        return text, plural
    return f"{article(text)} {text}", False


def article(text: str) -> str:
    """ "a" or "an", by how the first word sounds."""
    if re.match(r"(uni[cfv]|u-|eu|one\b|ewe|ufo|us[ei]|ok\b(?!.)|t-|ukulele)", text):
        return "a"
    return "an" if re.match(r"([aeiou]|hour|x-ray)", text) else "a"


def _with_article(found: re.Match[str]) -> str:
    return f"{found[1]} {article(found[2])} {found[2]}"


def _is_plural(text: str) -> bool:
    if text == "palms up together":
        return True
    words = re.split(rf"\s(?:{_HEAD_ENDS})\b", text)[0].split()
    verbs = [i for i, word in enumerate(words) if i and word.endswith("ing")]
    head = words[verbs[0] - 1] if verbs else words[-1]
    if text == "flexed biceps":
        return False
    if head in ("skis", "people", "men", "women", "children", "teeth", "feet", "mice"):
        return True
    if text.startswith("kissing ") and " and " in text:
        return True
    return head.endswith("s") and not head.endswith(("ss", "us", "is", "os")) and len(head) > 3
