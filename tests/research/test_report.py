# SPDX-License-Identifier: Apache-2.0
"""The report, on invented results."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from research.report import check_claims, score_tables, summarize, write_report


def yes_no(hits, wrong, missed, right):
    """A row of scores of yes/no questions by their counts: yes and there, yes and not there, no and there, no and not."""
    number = hits + wrong + missed + right
    return {
        "score": (hits + right) / number,
        "f1": 2 * hits / (2 * hits + wrong + missed),
        "precision": hits / max(1, hits + wrong),
        "recall": hits / (hits + missed),
        "yes_ratio": (hits + wrong) / number,
        "chance": max(hits + missed, wrong + right) / number,
        "questions": number,
    }


def result(name, seed, *, hits, pointing=None, auroc=0.6, relation=0.5, loss=2.5):
    """A run that finds `hits` of the 40 present objects in 100 questions, and 10 times reports an absent one."""
    kinds = ("existence", "existence_popular", "existence_adversarial", "negation")
    scores = {kind: yes_no(hits, 10, 40 - hits, 50) for kind in kinds}
    scores |= {kind: {"score": relation, "chance": 0.5} for kind in ("objects", "count", "position", "relation")}
    if pointing is not None:
        scores["pointing"] = {"score": pointing, "chance": 0.06, "chance_any_object": 0.3, "iou": 0.4, "mass": 0.5}
        scores["pointing"]["by_block"] = [pointing - 0.1, pointing + 0.1]
    similarity = {"auroc": auroc, "overlap": 0.7, "matching_mean": 0.4, "random_mean": 0.2, "pairs": 50}
    log = [
        {"step": step, "stage": stage, "lm_loss": 3 / step + seed / 10}
        for step, stage in zip((10, 20, 30), ("align", "guide", "guide"), strict=True)
    ]
    if pointing is not None and name != "unguided":
        log[1]["pointing_accuracy"], log[2]["pointing_accuracy"] = 0.5 * pointing, pointing
    return {
        "name": name,
        "title": f"the arm {name}",
        "seed": seed,
        "scores": {"test": scores},
        "similarity": {"test": similarity},
        "text_loss": {"model": loss, "language_model": 2.5},
        "log": log,
        "seconds": {"training": 100.0, "examination": 20.0},
        "settings": {},
        "versions": {"agevlm": "0.1.0", "torch": "2.6"},
    }


@pytest.fixture
def results():
    return {
        "concatenation": [result("concatenation", seed, hits=20 + seed) for seed in range(3)],
        "unguided": [result("unguided", seed, hits=25, pointing=0.2 + 0.01 * seed) for seed in range(3)],
        "guided": [
            result("guided", seed, hits=36 + seed, pointing=0.82 + 0.02 * seed, auroc=0.95, relation=0.8)
            for seed in range(3)
        ],
    }


def test_summaries_are_means_deviations_and_chance(results):
    found = summarize(results)["guided"]["test"]
    # 36, 37 and 38 hits of 40, and 10 that are wrong: F1 = 2 * hits / (2 * hits + 10 + missed)
    assert found["existence (random), F1"].values == (72 / 86, 74 / 87, 76 / 88)
    # 40 of 100 answers are yes: F1 of always saying so is 80 / 140
    assert found["existence (random), F1"].chance == pytest.approx(80 / 140)
    assert found["existence (random), accuracy"].values == pytest.approx((0.86, 0.87, 0.88))
    assert found["existence (random), accuracy"].chance == 0.6
    assert found["pointing"].mean == pytest.approx(0.84)
    assert found["pointing"].deviation == pytest.approx(0.02)  # sqrt((0.02² + 0 + 0.02²) / 2)
    assert str(found["pointing"]) == "0.840 ± 0.020"
    # At any object of the scene, and the object's share of the image.
    assert (found["pointing"].chance, found["attention inside"].chance) == (0.3, 0.06)
    assert found["attention IoU"].chance is None
    assert (found["similarity, AUROC"].chance, found["similarity, overlap (low is good)"].chance) == (0.5, 1.0)
    single = summarize({"guided": results["guided"][:1]})["guided"]["test"]["pointing"]
    assert str(single) == "0.820"


@pytest.mark.parametrize(
    ("hits", "wrong", "missed", "right"), [(0, 0, 40, 60), (0, 60, 40, 0), (40, 60, 0, 0), (3, 5, 7, 11)]
)
def test_chance_of_f1_needs_no_true_positive(results, hits, wrong, missed, right):
    results["guided"][0]["scores"]["test"]["existence"] = yes_no(hits, wrong, missed, right)
    share = (hits + missed) / (hits + wrong + missed + right)
    found = summarize({"guided": results["guided"][:1]})["guided"]["test"]["existence (random), F1"]
    assert found.chance == pytest.approx(2 * share / (1 + share))


def test_tables_have_a_column_for_each_variant_and_chance(results):
    tables = score_tables(results)
    assert list(tables) == ["test: mean ± standard deviation of 3 seeds", "test: pointing by block"]
    scores, blocks = tables.values()
    assert scores[0] == ["", "concatenation", "unguided", "guided", "chance"]
    rows = {row[0]: row[1:] for row in scores}
    assert rows["pointing"] == ["", "0.210 ± 0.010", "0.840 ± 0.020", "0.300"]
    assert rows["relation"] == ["0.500 ± 0.000", "0.500 ± 0.000", "0.800 ± 0.000", "0.500"]
    assert blocks[1:] == [["unguided", "0.110", "0.310", "0.210"], ["guided", "0.740", "0.940", "0.840"]]


def verdicts(results):
    return {claim.text: claim.held for claim in check_claims(results)}


def test_claims_that_hold(results):
    claims = check_claims(results)
    assert all(claim.held for claim in claims)
    # Three existence splits against two rivals, two on pointing, two on similarity, relation, position, and the text.
    assert len(claims) == 6 + 2 + 2 + 2 + 1
    first = claims[0]
    assert first.text == "test: existence (random), F1, guided > unguided"
    assert first.numbers == '0.850 ± 0.013 and 0.667 ± 0.000; chance 0.571 (always "Yes")'


@pytest.mark.parametrize(
    ("arm", "changes", "fails"),
    [
        ("unguided", {"hits": 40, "pointing": 0.2}, "F1, guided > unguided"),
        ("concatenation", {"hits": 40}, "F1, guided > concatenation"),
        ("guided", {"hits": 37, "pointing": 0.79, "auroc": 0.95, "relation": 0.8}, "pointing, guided ≥ 0.80"),
        ("unguided", {"hits": 25, "pointing": 0.43}, "pointing, guided ≥ 2 × unguided"),
        ("guided", {"hits": 37, "pointing": 0.84, "auroc": 0.89, "relation": 0.8}, "AUROC, guided ≥ 0.90"),
        ("concatenation", {"hits": 20, "auroc": 0.95}, "AUROC, guided > concatenation"),
        (
            "concatenation",
            {"hits": 20, "relation": 0.8},
            "relation, guided > concatenation|position, guided > concatenation",
        ),
        ("unguided", {"hits": 25, "pointing": 0.2, "loss": 2.5 + 2**-50}, "to the last bit"),
    ],
)
def test_claims_that_do_not_hold(results, arm, changes, fails):
    results[arm] = [result(arm, seed, **changes) for seed in range(3)]
    failed = [text for text, held in verdicts(results).items() if not held]
    assert failed
    assert all(any(text.endswith(end) for end in fails.split("|")) for text in failed), failed


def test_a_claim_that_holds_below_chance_says_so(results):
    results["guided"] = [result("guided", seed, hits=15, pointing=0.84, auroc=0.95, relation=0.8) for seed in range(3)]
    results["unguided"] = [result("unguided", seed, hits=14, pointing=0.2) for seed in range(3)]
    first = check_claims(results)[0]
    assert first.held
    # F1 is 30 / 65 and 28 / 64
    assert first.numbers == (
        '0.462 ± 0.000 and 0.438 ± 0.000; chance 0.571 (always "Yes"), which guided does not exceed'
    )


def test_claims_about_arms_that_are_not_there_are_left_out(results):
    del results["concatenation"]
    assert not any("concatenation" in text for text in verdicts(results))
    assert list(verdicts({"unguided": results["unguided"]})) == [
        "loss on text without an image, every model = its language model alone, to the last bit"
    ]


def test_the_report_is_whole_and_replaces_a_former_one(results, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/bin/python", "-m", "research.evidence", "--seeds", "0,1,2"])
    folder = tmp_path / "report"
    arguments = {"title": "Evidence", "claims": check_claims(results), "notes": {"masks": {"mean_iou": 0.5}}}
    tables = write_report(results, folder, **arguments)
    text = (folder / "report.md").read_text()
    for said in (
        "# Evidence",
        "- command: `python -m research.evidence --seeds 0,1,2`",
        "- seeds: 0, 1, 2",
        "18 minutes",
        "torch 2.6",
        "- masks: mean iou 0.500",
        "- `guided`: the arm guided",
        "| pointing |  | 0.210 ± 0.010 | 0.840 ± 0.020 | 0.300 |",
        "13 of 13 held",
    ):
        assert said in text
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"scores_test.png", "similarity.png", "training.png"}
    for name in pictures:
        assert f"]({name})" in text
        assert (folder / name).stat().st_size < 150_000
        with Image.open(folder / name) as image:
            assert image.width > 400
    stored = json.loads((folder / "results.json").read_text())
    assert stored["minutes"] == pytest.approx(18)
    assert [claim["held"] for claim in stored["claims"]] == [True] * 13
    for name, runs in results.items():
        assert stored["results"][name] == [{k: v for k, v in run.items() if k != "log"} for run in runs]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tables)
    assert "0.840 ± 0.020" in console.export_text()

    (folder / "notes.txt").write_text("of the user")
    monkeypatch.setattr("research.report.draw_scores", lambda *args: None)
    monkeypatch.setattr("research.report.draw_curves", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(results, folder, **arguments)
    assert (folder / "report.md").read_text() == text  # the former one, while the new one is not whole
    monkeypatch.setattr("research.report.draw_curves", lambda *args: None)
    write_report(results, folder, **arguments)
    assert (folder / "notes.txt").read_text() == "of the user"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_topics_have_their_own_tables_and_figures(results, tmp_path):
    topics = {"loss": ["unguided"]}
    write_report(results, tmp_path / "report", title="Ablations", topics=topics, reference="guided")
    text = (tmp_path / "report/report.md").read_text()
    assert "## loss" in text
    assert "|  | guided | unguided | chance |" in text
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"topic_loss.png", "training_loss.png"}


def test_curves_are_compared_by_title_and_stages_are_marked(results, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "research.report.draw_training", lambda logs, path, ends, **kwargs: drawn.update(logs=logs, ends=ends)
    )
    write_report(results, tmp_path / "report", title="Evidence")
    assert drawn["logs"] == {f"the arm {name}": [run["log"] for run in runs] for name, runs in results.items()}
    assert drawn["ends"] == [10]
