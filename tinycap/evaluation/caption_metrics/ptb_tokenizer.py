"""Penn-Treebank-style tokenisation of captions in Python, so that scoring them needs no Java.

The published caption scores are computed on the output of Stanford's `PTBTokenizer` (CoreNLP 3.4.1, with
`-preserveLines -lowerCase`), from which `pycocoevalcap` drops punctuation. This was written from that program's output
on captions; `benchmarks/tokenizer_agreement.py` measures the agreement. Addresses, mark-up, emoticons and telephone
numbers, which captions hardly contain, have no rules of their own. As there, brackets survive as the words `-lrb-` and
`-rrb-` (lower-cased before `-LRB-` would be dropped), and `?!` and `!!` (only single marks are dropped); emoji vanish.

Other languages than English: text is normalised to NFC, combining marks belong to their word, and scripts without
spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) are cut into characters, as sacreBLEU cuts Chinese.
"""

import functools
import re
import unicodedata


# Dropped by pycocoevalcap after tokenisation. Its list also has "-LRB-" and the like, which never occur lower-cased.
PUNCTUATION = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
# The same in scripts that the original list doesn't cover.
PUNCTUATION |= set("。、，．？！：；「」『』（）・।॥؟،؛۔։።፣་།")

# A full stop after one of these belongs to the word.
ABBREVIATIONS = "|".join(
    """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie
    cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga
    gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich
    minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte pptes ppty pptys
    pres prof profs pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt
    supts sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
""".split()
)
# Only before a number: "no. 2", "fig. 3".
NUMBER_ABBREVIATIONS = "art|ca|fig|figs|no|nos|op|pp|prop"
# One written word, two tokens, the first of three letters.
JOINED_WORDS = ("cannot", "gonna", "gotta", "wanna", "gimme", "lemme")
# Written differently by the tokenizer. Its names for brackets; the Latin-1 signs that it spells in ASCII.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
SPELLED = {
    "’": "'", "‘": "`", "‛": "'", "“": '"', "”": '"', "«": '"', "»": '"', "‹": "`", "›": "'",
    "…": " ... ", "–": " -- ", "—": " -- ", "―": " -- ",
    "&apos;": "'", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "€": "$", "£": "#", "¢": " cents ", "\u00ad": "",
    # Zero-width joiners shape the letters around them; the word is the same.
    "\u200c": "", "\u200d": "",
}  # fmt: skip


# `\w` lacks combining marks, without which "हिंदी" or a decomposed "Bär" would fall apart.
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
_LETTER = rf"(?:[^\W\d_][{_MARKS}]*)"
_ALNUM = rf"(?:[^\W_][{_MARKS}]*)"
# Characters, with their marks, of scripts that put no spaces between words.
UNSPACED = re.compile(
    "[\u0e01-\u0e4e\u0e80-\u0ecd\u0edc-\u0edf\u1000-\u103f\u1050-\u108f\u1780-\u17dd\u3005-\u3007\u3041-\u3096"
    f"\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d][{_MARKS}]*"
)
_END = r"(?![^\W_])"
# One-letter French, Irish and English prefixes: "l'eau", "12-o'clock".
_PREFIX = r"(?:[dolnDOLN]'(?=[^\W_]))"
_PART = rf"{_PREFIX}?{_ALNUM}+(?:_{_ALNUM}+)*"
_FIRST_PART = rf"(?:\d+(?:[.,]\d+)+{_END}|{_PART})"
_HYPHEN = "[-\u2010\u2011]"
_SLASHED = rf"{_ALNUM}+(?:{_HYPHEN}{_ALNUM}+){{0,2}}"

# Each alternative with the name of what it finds, in the order that makes the first match the longest one, which is
# what the original takes. Case matters to some of them, so that lower-casing comes after.
_KINDS = {
    # Most of a caption: found first, because it is quick to find.
    "plain": r"[a-zA-Z]+(?=\s|$)",
    "site": r"(?:www\.(?:[\w-]+\.)+[a-zA-Z]{2,4}|(?:[\w-]+\.)+(?:com|net|org|edu))(?!\w)"
    r"(?:/[^\s\"<>|().!?]+[^\s\"<>|(.,;:!?)'-])?",
    "quotes": r"''|``",
    # Clitics, and the words that they are cut from: do|n't, man|'s, 't|is.
    "before_not": rf"{_LETTER}+?(?=[nN]'[tT]{_END})",
    "clitic": rf"[nN]'[tT]{_END}|'(?i:s|m|d|re|ve|ll){_END}|'[tT](?=(?i:is|was))",
    "elided": rf"'(?i:em|till|til|cause)|'[nN]'|'[nN]{_END}|'\d\ds?(?=\s|$)",
    "joined": rf"(?i:{'|'.join(JOINED_WORDS)})(?![^\W_]|['-])",
    # Full stops that belong to the word.
    "before_number": rf"(?i:{NUMBER_ABBREVIATIONS})\.(?=\s?\d)",
    "acronym": rf"[A-Za-z](?:\.[A-Za-z])*\.{_END}|[A-Za-z](?:\.[A-Za-z])+{_END}",
    "dotted": rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)+",
    "abbreviation": rf"(?i:{ABBREVIATIONS})\.",
    # Words and numbers, alone or joined: "1,000-foot", "and/or", "5:30".
    "joined_by_slash": rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}",
    "joined_by_hyphen": rf"{_FIRST_PART}(?:{_HYPHEN}{_PART})+",
    "number": r"[-+]?(?:\d+(?:[.,:]\d+)+|(?:[.,:]\d+)+)|[-+]\d+",
    "word": _PART,
    # Punctuation, runs of it first.
    "dots": r"\.(?:\s?\.){2,}",
    "dashes": "[-\u2010-\u2012]+",
    "marks": r"[?!]+|\*+|_+|#+|@+|<<|>>|\^_\^",
    "bracket": r"[()\[\]{}]",
    "other": r"\S",
}
_TOKEN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items()))
_SPELLED = re.compile("|".join(re.escape(text) for text in SPELLED))
# Beyond the basic plane (emoji), or without width: the original has no rule for them and skips them.
_SKIPPED = re.compile("[\U00010000-\U0010ffff\u200b-\u200f\u2028-\u202e\ufe00-\ufe0f\ufeff\ufffd]")


# References are scored again and again, by baselines and as a reward.
@functools.lru_cache(maxsize=2**16)
def ptb_tokenize(text: str) -> str:
    """What `pycocoevalcap`'s `PTBTokenizer` makes of a caption: lower-cased tokens without punctuation, joined by
    single spaces; "" when there is none. Line breaks count as spaces."""
    text = unicodedata.normalize("NFC", text)
    text = _SPELLED.sub(lambda match: SPELLED[match[0]], text)
    text = UNSPACED.sub(r" \g<0> ", text)
    text = _SKIPPED.sub(" ", text)
    tokens = [token for match in _TOKEN.finditer(text) for token in _spell(match.lastgroup, match[0].lower())]
    return " ".join(token for token in tokens if token not in PUNCTUATION)


def _spell(kind: str, token: str) -> list[str]:
    """How a lower-cased token of this kind (see `_KINDS`) is written: nearly always as it is."""
    if kind in ("plain", "joined") and token in JOINED_WORDS:
        return [token[:3], token[3:]]
    if kind == "bracket":
        return [BRACKETS[token]]
    if kind == "dashes":
        return ["-" if len(token) == 1 else "--" if len(token) < 5 else token]
    return ["..." if kind == "dots" else "''" if token == '"' else token]
