# SPDX-License-Identifier: Apache-2.0
"""CV-Bench: its rules, metrics worked by hand, its data, and the command from end to end."""

import pytest
from command_line import run
from evaluation_cases import (
    CV_CASES,
    as_parquet_folder,
    cells,
    changed_line,
    content,
    cv_rows,
    cv_table,
    entries,
    give_answers,
    picture,
    results,
    write_lines,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm.evaluation import CvBench, Question
from agevlm.evaluation.cv_bench import parse_choice, read_choice

# --- rules and metrics ---

CHAIRS = ("red chair", "chair", "dining table", "table")


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        # Forms in lmms-eval's and Cambrian's scripts, which read the same letter from them.
        ("A", CHAIRS, "A"),
        ("a", CHAIRS, "A"),
        ("(B)", CHAIRS, "B"),
        ("(b) red chair", CHAIRS, "B"),
        ("B) red chair", CHAIRS, "B"),
        ("C.", CHAIRS, "C"),
        ("D: the table", CHAIRS, "D"),
        ("A, because it is in front", CHAIRS, "A"),
        ("B because the dining table is behind it", CHAIRS, "B"),
        ("The answer is (C).", CHAIRS, "C"),
        ("Answer: D", CHAIRS, "D"),
        ("The answer is (A)? No, the answer is B.", CHAIRS, "B"),  # the last one
        ("A\nBecause the table is behind it.", CHAIRS, "A"),
        (" **B** ", CHAIRS, "B"),
        ("'C'", CHAIRS, "C"),
        ("(A) red chair\n(B) chair", CHAIRS, "A"),  # repeats the choices: the first, as Cambrian's
        ("3", ("4", "3", "12"), "B"),
        # Letters inside.
        ("It must be (D), I think.", CHAIRS, "D"),
        ("Either (A) or (B).", CHAIRS, None),
        ("I see (E).", CHAIRS, None),  # there is no such choice
        # In words.
        ("The Red Chair is closer.", CHAIRS, "A"),
        ("the chair", CHAIRS, "B"),
        ("dining table.", CHAIRS, "C"),
        ("A table is closer.", CHAIRS, "D"),  # an article, no choice
        ("Between the chair and the table.", CHAIRS, None),
        ("There are 12 of them", ("1", "2", "12"), "C"),
        ("There are 2.", ("1", "2", "12"), "B"),
        ("above", ("below", "above"), "B"),  # Cambrian's first letter would make A of it
        ("A is closer", CHAIRS, "A"),
        ("A chair and a table", CHAIRS, None),
        ("The red chair", ("red", "red chair"), "B"),
        # Nothing.
        ("", CHAIRS, None),
        ("E", CHAIRS, None),
        ("chairs", CHAIRS, None),
        ("I do not know.", CHAIRS, None),
    ],
)
def test_choice(text, choices, expected):
    assert parse_choice(text, choices) == expected


READ_LENIENTLY = {
    "A": "Option A|The answer is option A.|Answer : A|<answer>A</answer>|(A)|A.|**A**|[A]|\\boxed{A}|red chair|Choice: a|"
    "The correct choice is A|It must be (A), I think.|A, because B is further away|A chair and a table: A",
    "B": "Option B|option b.|The answer is option B.|Answer : B|<answer>B</answer>|<answer>the chair</answer>|(B)|B.|**B**|"
    "I choose B|I'd say B|Final answer → B|answer=b|B, since A and C are further|The letter is “B”|"
    "The answer is (A)? No, the answer is B.",
    None: "|A or B|A and B|A/B|A, B|A, B, or C|(A) or (B)|Either (A) or (B).|either A or B|Both A and B|Option A or option B|"
    "<answer>A or B</answer>|neither A nor B|It is not B|It isn't B.|a or b|the answer is a bird|E|Option E|I do not know.|"
    "A chair and a table|<answer></answer>|犬",
}


@pytest.mark.parametrize(
    ("text", "expected"), [(text, letter) for letter, texts in READ_LENIENTLY.items() for text in texts.split("|")]
)
def test_choice_by_the_lenient_rule(text, expected):
    assert read_choice(text, CHAIRS) == expected


CHOICE_PARTS = ["A", "B", "a", "b", "E", "option", "Option", "answer is", "Answer :", "or", "and", "not", "red chair", "table",
                "<answer>", "</answer>", "(", ")", "**", ".", ",", "/", "'", "\n", " "]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(max_size=60), st.lists(st.sampled_from(CHOICE_PARTS), max_size=9).map(" ".join)),
    st.lists(st.text(min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=5),
)
def test_any_text_has_a_choice_or_none_and_the_lenient_rule_finds_no_other(text, texts):
    for choices in (CHAIRS, texts):
        strict, lenient = parse_choice(text, choices), read_choice(text, choices)
        assert lenient in (*"ABCDE"[: len(choices)], None)
        assert strict is None or lenient in (strict, None)


def test_the_scores_say_how_many_answers_only_the_lenient_rule_reads():
    answers = {"B": True, "Option B": True, "A or B": False, "<answer>A</answer>": True, "hm": False}
    questions = [cv_question("Count", "COCO", number, "B") for number in range(len(answers))]
    scores = CvBench().score(questions, {q.key: {"answer": a} for q, a in zip(questions, answers, strict=True)})
    assert scores["Count"] == {
        "accuracy": 1 / 5,
        "chance": 1.0,  # of "B", which is always right here
        "questions": 5,
        "unparsed": 3,  # "A or B" is A
        "lenient_accuracy": 2 / 5,
        "lenient_unanswered": 2,
        "lenient_only": 2,
    }
    assert scores["2D"]["lenient_accuracy"] is None  # ADE20K was not asked


def cv_question(task, source, number, letter="A", choices=("one", "two")):
    return Question(f"{task}/{number}", lambda: picture(0), "?", letter, task, source, choices)


def cv_case():
    """Right: ADE20K 3 of 4, COCO 1 of 2, Omni3D 2 of 5."""
    questions, answers = [], {}
    plan = [
        ("Count", "ADE20K", "11"),
        ("Relation", "ADE20K", "10"),
        ("Relation", "COCO", "10"),
        ("Depth", "Omni3D", "10x"),
        ("Distance", "Omni3D", "10"),
    ]
    for task, source, outcomes in plan:
        for outcome in outcomes:
            question = cv_question(task, source, len(questions), "AB"[len(questions) % 2])
            right = question.expected
            wrong = "BA"["AB".index(right)]
            questions.append(question)
            answers[question.key] = {"answer": {"1": f"({right})", "0": wrong, "x": "hm"}[outcome]}
    return questions, answers


def accuracies(scores):
    return {name: row["accuracy"] for name, row in scores.items()}


def test_cv_bench_scores_worked_by_hand():
    scores = CvBench().score(*cv_case())
    assert accuracies(scores) == pytest.approx(
        {
            "ADE20K": 3 / 4,
            "COCO": 1 / 2,
            "Omni3D": 2 / 5,
            "2D": 5 / 8,  # (3/4 + 1/2) / 2, where all 2D questions together would give 4/6
            "3D": 2 / 5,
            "overall": 41 / 80,  # (5/8 + 2/5) / 2, where all questions together would give 6/11
            "Count": 1,
            "Relation": 1 / 2,
            "Depth": 1 / 3,
            "Distance": 1 / 2,
        }
    )
    assert {name: row["questions"] for name, row in scores.items()} == {
        "overall": 11, "2D": 6, "3D": 5, "ADE20K": 4, "COCO": 2, "Omni3D": 5,
        "Count": 2, "Relation": 4, "Depth": 3, "Distance": 2,
    }  # fmt: skip
    unparsed = {name for name, row in scores.items() if row["unparsed"]}
    assert unparsed == {"overall", "3D", "Omni3D", "Depth"}


def test_cv_bench_scores_of_parts():
    questions, answers = cv_case()
    scores = CvBench().score([question for question in questions if question.kind == "Relation"], answers)
    expected = {"overall": None, "2D": 0.5, "3D": None, "ADE20K": 0.5, "COCO": 0.5, "Relation": 0.5}
    assert accuracies(scores) == expected
    scores = CvBench().score([question for question in questions if question.source == "ADE20K"], answers)
    assert accuracies(scores) == {
        "overall": None, "2D": None, "3D": None, "ADE20K": 0.75, "Count": 1, "Relation": 0.5,
    }  # fmt: skip


# --- data ---


def test_cv_bench_is_read_alike_from_all_forms(cv_files, tmp_path):
    theirs = CvBench(cv_files).questions()
    table = cv_table(cv_files)
    table.save_to_disk(tmp_path / "saved")
    clone = as_parquet_folder(table, tmp_path / "clone")
    whole = CvBench(tmp_path / "saved").questions()
    assert [(q.kind, q.source, q.choices, f"({q.expected})") for q in whole] == [
        (task, source, tuple(choices), label) for task, source, _, choices, label in CV_CASES
    ]
    assert [q.key for q in whole] == ["Count/1", "Count/2", "Relation/3", "Depth/4", "Distance/5", "Count/6"]
    assert whole[0].text == (
        "How many cats are in the image? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1\n(D) 0"
    )
    expected = content(whole)
    for place in (clone, clone / "test-00000-of-00001.parquet"):
        assert content(CvBench(place).questions()) == expected
    # The authors' files have the 2D questions in one and the 3D questions in the other.
    assert sorted(content(theirs)) == sorted(expected)
    (tmp_path / "elsewhere").mkdir()
    moved = write_lines(tmp_path / "elsewhere" / "test_2d.jsonl", cv_rows()[:2])
    assert content(CvBench(moved, cv_files).questions()) == expected[:2]


def test_parts_of_cv_bench(cv_files):
    table = cv_table(cv_files)
    place = as_parquet_folder(table, cv_files.parent / "clone")
    questions = CvBench(place, tasks=["Count", "Depth"]).questions(1)
    # The first of each task and source, so that no source is left out.
    assert [q.key for q in questions] == ["Count/1", "Count/2", "Depth/4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answer": "(E)"},
            r"test_2d\.jsonl, row 1: its answer must be one of \(A\), \(B\), \(C\), \(D\), got '\(E\)'",
        ),
        ({"answer": "C"}, r"got 'C'"),
        ({"task": "Color"}, "its task must be one of Count, Relation, Depth, Distance, got 'Color'"),
        ({"source": "LVIS"}, "its source must be one of ADE20K, COCO, Omni3D, got 'LVIS'"),
        ({"choices": "3 2 1 0"}, "its choices must be a list of texts"),
        ({"choices": ["3", " "]}, "its choices must be a list of texts"),
        ({"choices": []}, "its choices must be a list of texts"),
        ({"filename": 3}, r"test_2d\.jsonl, row 1: its filename must be a text, got 3"),
        ({"prompt": 3}, "row 1: its prompt must be a text, got 3"),
        ({"filename": ...}, "line 1: lacks filename"),
        ({"filename": "img/no.png"}, r"row 1: no such image file: .*no\.png"),
    ],
)
def test_mistakes_in_cv_bench(cv_files, changes, message):
    changed_line(cv_files / "test_2d.jsonl", 0, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CvBench(cv_files).questions()


def test_unknown_task(cv_files):
    with pytest.raises(ValueError, match="no task 'Depth' in the data; there are: Count, Relation"):
        CvBench(cv_files / "test_2d.jsonl", tasks=["Count", "Depth"]).questions()


# --- the command ---


@pytest.mark.parametrize("model", ["age_vlm", "llava"])
def test_cv_bench_command(monkeypatch, capsys, tmp_path, folders, cv_files, model):
    table = cv_table(cv_files)
    data = as_parquet_folder(table, tmp_path / "clone")
    command = ["cv-bench", "--model", folders / model, "--data", data, "--out", tmp_path / "out"]
    command += ["--max-new-tokens", 5, "--batch-size", 4]
    code, printed = run(monkeypatch, capsys, "eval", *command)
    assert code == 0, printed
    found = entries(tmp_path / "out")
    suffix = "\nAnswer with the option's letter from the given choices directly."
    assert [entry["question"] for entry in found] == [row["prompt"] + suffix for row in cv_rows()]
    questions = CvBench(data).questions()
    written = results(tmp_path / "out")
    assert written["scores"] == CvBench().score(questions, {entry["key"]: entry for entry in found})
    assert written["settings"]["benchmark"] == "CV-Bench"

    # Right: ADE20K 1 of 2, COCO 2 of 2, Omni3D 1 of 2.
    given = {"Count/1": "(C) 1", "Count/2": "A", "Relation/3": "below", "Depth/4": "hm", "Distance/5": "B."}
    give_answers(tmp_path / "out", given | {"Count/6": "A"})
    code, printed = run(monkeypatch, capsys, "eval", *command)
    assert code == 0, printed
    expected = {
        "overall": ["6", "0.6250", "1"],
        "2D": ["4", "0.7500", "0"],
        "3D": ["2", "0.5000", "1"],
        "ADE20K": ["2", "0.5000", "0"],
        "COCO": ["2", "1.0000", "0"],
        "Omni3D": ["2", "0.5000", "1"],
        "Count": ["3", "0.6667", "0"],
        "Relation": ["1", "1.0000", "0"],
        "Depth": ["1", "0.0000", "1"],
        "Distance": ["1", "1.0000", "0"],
    }
    assert cells(printed, "│") == expected
    assert cells((tmp_path / "out" / "report.md").read_text(), "|") == expected
    give_answers(tmp_path / "out", given | {"Count/6": "A", "Depth/4": "Option A"})
    code, printed = run(monkeypatch, capsys, "eval", *command)
    assert code == 0, printed
    for text in (printed.replace("│", "|"), (tmp_path / "out" / "report.md").read_text()):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        lenient = {row[0]: row[1:] for row in rows if len(row) == 5}
        assert lenient["Depth"] == ["0.0000", "1.0000", "0", "1 of 1"]
        assert lenient["overall"] == ["0.6250", "0.8750", "0", "1 of 1"]
