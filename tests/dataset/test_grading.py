"""dataset/grading.py: usual forms of answers, numbers, truths and grades, against true values."""

import pytest

from dataset.grading import (
    contains,
    fold_text,
    grade,
    last_number,
    normalize_text,
    read_numbers,
    read_rating,
    read_truth,
    same_number,
)
from model.errors import UserError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("The total is 1,250.", [1250]),
        ("$1,250.00 or 1250元", [1250, 1250]),
        ("１２５０ and 1，250", [1250, 1250]),
        ("1\u202f250, 1'250, 1_250", [1250] * 3),
        ("1,250,300.5", [1250300.5]),
        (r"1{,}250 and 1\,250", [1250, 1250]),
        ("1, 250", [1, 250]),
        ("1.25e3 and 1.25E-2", [1250, 0.0125]),
        ("1.25×10³, 1.25 x 10^3", [1250, 1250]),
        (r"$1.25 \times 10^{3}$", [1250]),
        ("25 m² are 2^10 or x^2", [25, 1024]),
        (r"\boxed{1250} and \boxed{\frac{3}{4}}", [1250, 0.75]),
        ("3/4, 1 1/2, ¾, 1½", [0.75, 1.5, 0.75, 1.5]),
        ("2024/12/05", [2024, 12, 5]),
        ("1/0 and 1e999", []),
        ("−5, –5, －5, -5, -$5, $-5, 是-5", [-5] * 7),
        ("12-5, 12 -5, 12 - 5, GPT-4", [12, 5, 12, 5, 12, 5, 4]),
        ("x = -5", [-5]),
        ("50% and ５０％", [50, 50]),
        ("1.2万 and 3亿", [12000, 3e8]),
        (".5 and **7** and *8*", [0.5, 7, 8]),
        ("2 ** 3, 2**3, 93*16=1488", [2, 3, 2, 3, 93, 16, 1488]),
        ("no number, v1.2.3x", [1.2]),
    ],
)
def test_numbers_are_read_as_people_write_them(text, values):
    assert [number.value for number in read_numbers(text)] == pytest.approx(values)


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("The total is 1,250.", "1250", True),
        ("1250 (step 2)", "1250", True),
        ("four (4 apples)", "4", True),
        ("So 3 + 4 = 7.\n#### 7", "7", True),
        ("It is \\boxed{18}, as 9 · 2 shows.", "18", True),
        ("12-5", "-5", False),
        ("3/4", "0.75", True),
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("5%", "50", False),
        ("0.3333333", "1/3", True),
        ("0.33", "1/3", False),
        ("4 or 5", "4", False),
        ("", "4", False),
        ("none", "none", False),
    ],
)
def test_the_last_number(text, answer, same):
    assert same_number(text, answer) is same
    assert same_number(answer, text) is same


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        *[
            ("Paris", reply, True)
            for reply in ("paris.", " Paris\n", "Paris!", "**Paris**", "*Paris*")
        ],
        *[
            ("Paris", reply, True)
            for reply in ("“Paris”", "`Paris`", "Paris؟", "- Paris", "Ｐａｒｉｓ")
        ],
        *[("巴黎", reply, True) for reply in ("巴黎。", "《巴黎》", "「巴黎」！", "巴黎……")],
        *[
            ("1250", reply, True)
            for reply in ("1,250", "$1,250.00", "1250元", "1.25e3", "#### 1250")
        ],
        ("9", "九", True),
        ("0.75", "3/4", True),
        ("Paris", "The answer is Paris", False),
        ("12", "12 or 13", False),
        ("5", "-5", False),
        ("-5", "12-5", False),
        ("C", "C#", False),
        ("50", "50%", True),
        ("a b", "ab", False),
        ("a_b", "ab", False),
        ("", "", False),
        ("!", "", False),
        ("", "!", False),
        ("!", "!", True),
    ],
)
def test_an_answer_is_right_in_any_form(answer, reply, right):
    assert grade(answer, reply) is right


@pytest.mark.parametrize(
    ("part", "answer", "found"),
    [
        ("144", "12 * 12 = 144.", True),
        ("1,440", "It is 1440", True),
        ("144", "1440", False),
        ("144", "-144", False),
        ("3.5", "$3.50", True),
        ("0.3333333", "0.33333331", True),
        ("0.3333333", "0.3333", False),
        ("cat", "A Cat.", True),
        ("cat", "category", False),
        ("晴", "今天晴天", True),
        ("22°C", "22°C in Oslo", True),
        ("22°C", "122°C in Oslo", False),
        ("5 kg", "1.5 kg", False),
        ("2025-01-01", "It is 2025-01-01 13:00", True),
        ("4", "", False),
    ],
)
def test_an_answer_contains_a_part(part, answer, found):
    assert contains(answer, part) is found


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        *[
            (text, 0.8)
            for text in ("8", "8/10", "8 / 10", "Score: 8", "**8**", "8 out of 10", "4/5")
        ],
        *[
            (text, 0.8)
            for text in ("8.", "８", "八", "80%", "8分（满分10分）", "评分：8", "I give 80/100.")
        ],
        *[(text, 0.9) for text in ("On a scale from 0 to 10: 9", "9. It is right: 2 + 2 = 4")],
        *[(text, 0.9) for text in ("<think>\n0 to 10. 2+2 is 4.\n</think>\n\n9", "从0到10：9")],
        ("9.5 out of 10", 0.95),
        ("10", 1.0),
        ("0", 0.0),
        *[(text, None) for text in ("-3", "11", "hm", "", "<think>8", "12/10", "1/0")],
    ],
)
def test_a_judges_grade(text, rating):
    assert read_rating(text) == (rating if rating is None else pytest.approx(rating))


@pytest.mark.parametrize(
    ("row", "last", "parts", "anywhere"),
    [
        ({"answer": 42}, "no", ("42",), False),
        ({"answer": "42", "gt": ["43"]}, None, ("42",), False),
        ({"answer": None, "gt": ["1", None, "", 2]}, "", ("1", "2"), True),
        ({"gt": "144"}, "", ("144",), True),
        ({"gt": '["1", "2"]'}, "", ("1", "2"), True),
        ({"gt": []}, "It is 4.", ("It is 4.",), False),
        ({}, "<think>\n2 + 2\n</think>\n\nIt is 4.", ("It is 4.",), False),
        ({}, "<think>\n5?\n</think>\n<answer>\n4\n</answer>", ("4",), False),
        ({"answer": " "}, "<answer></answer>", None, False),
        ({}, "<think>\nNever done: 4", None, False),
        ({"answer": "", "gt": [""]}, "", None, False),
        ({}, None, None, False),
    ],
)
def test_the_truth_of_a_row(row, last, parts, anywhere):
    truth = read_truth(row, last)
    assert (truth and truth.parts) == parts
    if truth:
        assert truth.anywhere is anywhere and truth.score("") == truth.score("\n") == 0


def test_the_score_of_a_truth():
    truth = read_truth({"gt": ["1488", "2150", "Paris"]})
    assert truth.score("93*16 = 1,488, and 2150; it is in paris.") == 1
    assert truth.score("1488") == pytest.approx(1 / 3)
    assert read_truth({"answer": "4"}).score("4.0") == 1
    assert read_truth({"answer": "4"}).score("It is 4") == 0


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"answer": "<think>\n2+2\n</think>\n<answer>4</answer>"}, ("4",)),
        ({"answer": "Write <think> first."}, ("Write <think> first.",)),
        ({"gt": "['4', 'Paris']"}, ("4", "Paris")),
        ({"gt": "null", "answer": float("nan")}, None),
        ({"answer": "null", "gt": ["4", "null"]}, ("4",)),
    ],
)
def test_a_truth_as_exporters_write_it(row, parts):
    truth = read_truth(row)
    assert (truth and truth.parts) == parts


@pytest.mark.parametrize("row", [{"answer": ["4"]}, {"gt": {"a": 1}}, {"gt": [["4"]]}])
def test_a_truth_of_another_form_is_refused(row):
    with pytest.raises(UserError, match="that is no text"):
        read_truth(row)


def test_texts_by_hand():
    assert normalize_text(" **“The  Answer”**!? ") == "the answer"
    assert fold_text(" **The  Answer**。") == "**the answer**"
    assert last_number("none") is None
