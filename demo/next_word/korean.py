"""Korean morphology: which particle follows a word, and how a verb joins its ending."""

import re

FIRST, LAST, VOWELS, CODAS = 0xAC00, 0xD7A3, 21, 28
VOWEL = {v: i for i, v in enumerate("ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ")}
NONE, N, D, L, M, B, S, SS = 0, 4, 7, 8, 16, 17, 19, 20
BRIGHT = {VOWEL[v] for v in "ㅏㅑㅗ"}
FUSED = {VOWEL[a]: VOWEL[b] for a, b in ("ㅗㅘ", "ㅜㅝ", "ㅣㅕ", "ㅚㅙ")}
UNCHANGED = {VOWEL[v] for v in "ㅏㅐㅓㅔㅕ"}
CODA_OF_ENDING = {"을": L, "은": N, "음": M}

REGULAR_B = set("입잡뽑씹접좁업집꼽뵙")
IRREGULAR_D = set("듣걷싣묻")
IRREGULAR_S = set("낫짓붓잇긋")
REGULAR_REU = ("따르", "치르", "들르")

PARTICLES = "은/는|이/가|을/를|과/와|으로/로|이에요/예요|이었/였|이라/라|이나/나|이랑/랑|이며/며|이고/고"
PARTICLE = re.compile(rf"([가-힣])({PARTICLES})")
VERB = re.compile(r"([가-힣]+)다\+([가-힣]+)")


def split(syllable: str) -> tuple[int, int, int]:
    """Indices of the initial consonant, the vowel and the final consonant (0: none) of one Hangul syllable."""
    code = ord(syllable) - FIRST
    return code // (VOWELS * CODAS), code // CODAS % VOWELS, code % CODAS


def compose(initial: int, vowel: int, coda: int) -> str:
    return chr(FIRST + (initial * VOWELS + vowel) * CODAS + coda)


def with_coda(word: str, coda: int) -> str:
    """The word with the final consonant of its last syllable replaced."""
    initial, vowel, _ = split(word[-1])
    return word[:-1] + compose(initial, vowel, coda)


def infinitive(stem: str) -> str:
    """The 아/어 form of a verb's stem: 먹 -> 먹어, 하 -> 해, 춥 -> 추워."""
    initial, vowel, coda = split(stem[-1])
    own = "아" if vowel in BRIGHT else "어"
    if stem[-1] == "하":
        return stem[:-1] + "해"
    if coda == B and stem[-1] not in REGULAR_B:
        return with_coda(stem, NONE) + ("와" if stem == "돕" else "워")
    if coda == D and stem[-1] in IRREGULAR_D:
        return with_coda(stem, L) + own
    if coda == S and stem[-1] in IRREGULAR_S:
        return with_coda(stem, NONE) + own
    if coda != NONE or vowel not in FUSED.keys() | UNCHANGED | {VOWEL["ㅡ"]}:
        return stem + own
    if vowel == VOWEL["ㅡ"]:
        bright = len(stem) > 1 and split(stem[-2])[1] in BRIGHT
        fused = compose(initial, VOWEL["ㅏ" if bright else "ㅓ"], NONE)
        doubled = stem[-1] == "르" and not stem.endswith(REGULAR_REU)
        return (with_coda(stem[:-1], L) if doubled else stem[:-1]) + fused
    return stem[:-1] + compose(initial, FUSED.get(vowel, vowel), NONE)


def conjugate(stem: str, ending: str) -> str:
    """Join a stem and an ending. The ending has its form after 먹-: 어요, 었다, 으면, 을, 는다, 습니다."""
    coda = split(stem[-1])[2]
    if ending[0] == "어":
        return infinitive(stem) + ending[1:]
    if ending[0] == "었":
        return with_coda(infinitive(stem), SS) + ending[1:]
    if ending[0] == "습":
        return with_coda(stem, B) + ending[1:] if coda in (NONE, L) else stem + ending
    if ending.startswith("는다"):
        return with_coda(stem, N) + ending[1:] if coda in (NONE, L) else stem + ending
    if ending[0] in "으을은음":
        return _join_eu(stem, coda, ending)
    if coda == L and ending[0] in "는네나니":
        return with_coda(stem, NONE) + ending
    return stem + ending


def _join_eu(stem: str, coda: int, ending: str) -> str:
    if coda == D and stem[-1] in IRREGULAR_D:
        return with_coda(stem, L) + ending
    if coda == S and stem[-1] in IRREGULAR_S:
        return with_coda(stem, NONE) + ending
    if coda == B and stem[-1] not in REGULAR_B:
        stem, coda = with_coda(stem, NONE) + "우", NONE
    if coda not in (NONE, L):
        return stem + ending
    if ending[0] != "으":
        return with_coda(stem, CODA_OF_ENDING[ending[0]]) + ending[1:]
    drops = coda == L and ending[1] in "니세시셨십"
    return (with_coda(stem, NONE) if drops else stem) + ending[1:]


def attach_particle(match: re.Match[str]) -> str:
    last, (after_coda, after_vowel) = match[1], match[2].split("/")
    coda = split(last)[2]
    closed = coda != NONE and not (after_coda == "으로" and coda == L)
    return last + (after_coda if closed else after_vowel)


def inflect(text: str) -> str:
    """Resolve 먹다+었어요 to 먹었어요 and 밥을/를 to 밥을 throughout a sentence."""
    text = VERB.sub(lambda match: conjugate(match[1], match[2]), text)
    return PARTICLE.sub(attach_particle, text)
