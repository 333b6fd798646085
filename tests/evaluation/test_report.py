"""The report: its numbers, its files, and what it does with hostile or degenerate input."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from evaluation_cases import history, random_case
from PIL import Image

from bayes_kf import evaluation as ev


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report() -> ev.Report:
    probs, targets = random_case()
    generator = torch.Generator().manual_seed(1)
    samples = (2 * torch.randn(6, 200, 3, generator=generator)).softmax(dim=-1)
    return ev.evaluate_predictions(
        probs,
        targets,
        samples=samples,
        ood={"noise": torch.full((50, 3), 1 / 3)},
        history=history(),
        parameter_variance={"a": torch.rand(3), "b": torch.rand(2, 2)},
        config={"likelihood": "categorical"},
        class_names=["<script>alert(1)</script>", "a & b", 'c"d'],
        title="<b>Digits</b>",
        num_simulations=200,
    )


def test_scores_are_those_of_the_functions(report):
    probs, targets = random_case()
    scores = report.scores
    assert all(isinstance(value, float) for value in scores.values())
    assert scores["accuracy"] == ev.accuracy(probs, targets)
    assert scores["nll"] == ev.negative_log_likelihood(probs, targets)
    assert scores["brier"] == ev.brier_score(probs, targets)
    assert scores["online_accuracy"] == ev.running_accuracy(history()["correct"])[-1]
    assert scores["entropy"] == pytest.approx(scores["aleatoric"] + scores["epistemic"])
    assert scores["ood_noise_auroc"] == 1  # uniform predictions have the largest entropy there is
    assert {"ood_noise_aupr", "ood_noise_fpr95", "prequential_log_loss", "innovation_ratio_null_low"} <= set(scores)


@pytest.mark.parametrize(
    ("name", "statistic", "binning", "kind"),
    [
        ("ece", "ece", "equal_width", "top_label"),
        ("ece_equal_mass", "ece", "equal_mass", "top_label"),
        ("ece_classwise", "ece", "equal_width", "classwise"),
        ("mce", "mce", "equal_width", "top_label"),
        ("confidence_gap", "gap", "equal_width", "top_label"),
    ],
)
def test_every_calibration_score_has_its_band(report, name, statistic, binning, kind):
    test = ev.calibration_test(*random_case(), statistic, binning=binning, kind=kind, num_simulations=200)
    found = [report.scores[name + suffix] for suffix in ("", "_null_mean", "_null_low", "_null_high", "_p_value")]
    assert found == list(test)


def test_saved_files(report, tmp_path):
    path = report.save(tmp_path / "new" / "report.html")
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json", "report.png"]
    with Image.open(path.with_suffix(".png")) as image:
        assert image.width > 800

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(path.with_suffix(".json").read_text("utf-8"), parse_constant=refuse)
    assert content["scores"] == report.scores
    assert content["sizes"] == {"examples": 200, "classes": 3, "foreign examples, noise": 50}
    assert content["config"]["likelihood"] == "categorical"
    with pytest.raises(ValueError, match=r"^`path` must end in \.html, got 'report\.pdf'\.$"):
        report.save("report.pdf")


def test_the_page_asks_for_nothing_and_can_be_read_without_seeing(report):
    page = Page(report.to_html())
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name in ("src", "href", "srcset", "action", "style"):
            assert (attributes.get(name) or "data:").startswith("data:image/svg+xml;base64,") or name not in attributes
    assert "@import" not in report.to_html()
    assert not re.search(r"url\(", report.to_html())
    images = page.all("img")
    assert len(images) == len(report.figures) == 5
    assert all(len(image["alt"]) > 30 for image in images)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(attributes.get("scope") in {"row", "col"} for attributes in page.all("th"))


def test_embedded_pictures_ask_for_nothing_either(report):
    for image in Page(report.to_html()).all("img"):
        svg = base64.b64decode(image["src"].split(",")[1]).decode("utf-8")
        references = re.findall(r'(?:href|src)\s*=\s*"([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
        assert references
        assert all(reference.startswith(("#", "data:")) for reference in references)


def test_names_are_text_not_markup(report):
    html = report.to_html()
    page = Page(html)
    assert page.all("script") == []
    assert page.all("b") == []
    assert "<script>alert(1)</script>" in page.text
    assert "<b>Digits</b>" in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_dollars_in_titles_are_no_mathematics(tmp_path):
    probs, targets = random_case(20)
    ood = {"a $5 bill": probs, "_x": probs}
    report = ev.evaluate_predictions(probs, targets, ood=ood, title=r"costs $\bad$", num_simulations=39)
    assert report.save(tmp_path / "report.html").exists()


def test_figures_are_drawn_once_and_not_before_they_are_asked_for():
    report = ev.evaluate_predictions(*random_case(), num_simulations=39)
    assert "figures" not in vars(report)
    assert report.figures["reliability"] is report.figures["reliability"]


def test_the_same_report_gives_the_same_page():
    pages = [ev.evaluate_predictions(*random_case(), num_simulations=39).to_html() for _ in range(2)]
    assert pages[0] == pages[1]


def test_infinite_loss_is_null_in_json_and_said_on_the_page():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    report = ev.evaluate_predictions(probs, torch.tensor([1, 0]), num_simulations=39)
    content = json.loads(report.to_json())
    assert content["scores"]["nll"] is None
    assert content["not_finite"] == {"nll": "inf"}
    assert "At least one label was given probability zero" in report.to_html()
    assert "∞" in Page(report.to_html()).text


def test_log_probabilities_replace_underflowed_ones():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    log_prob = torch.tensor([-200.0, math.log(0.5)])
    report = ev.evaluate_predictions(probs, torch.tensor([1, 0]), log_prob=log_prob, num_simulations=39)
    assert report.scores["nll"] == pytest.approx((200 + math.log(2)) / 2)


def test_verdicts_tell_over_from_under_confidence_and_chance():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    first = {
        scale: ev.evaluate_predictions((scale * logits).softmax(dim=1), targets, num_simulations=200).sections.verdict[
            0
        ]
        for scale in (0.5, 1.0, 2.0)
    }
    assert first[0.5].startswith("Under-confident by ")
    assert first[1.0].startswith("Confidence and accuracy agree on average")
    assert re.match(
        r"Over-confident by \d+\.\d points on average .*; chance alone would show up to \d\.\d\.", first[2.0]
    )


@pytest.mark.parametrize(("num_examples", "num_classes"), [(1, 2), (3, 100)])
def test_small_and_wide_cases_have_a_page(num_examples, num_classes):
    probs, targets = random_case(num_examples, num_classes)
    html = ev.evaluate_predictions(probs, targets, num_simulations=39).to_html()
    assert "not defined" in Page(html).text  # recall of a class that never came


def test_wrong_number_of_class_names_is_refused():
    with pytest.raises(ValueError, match=r"^`class_names` must hold 3 names, got 2\.$"):
        ev.evaluate_predictions(*random_case(), class_names=["a", "b"])
