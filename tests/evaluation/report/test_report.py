"""The report: its numbers, its files, and what it does with hostile or degenerate input."""

import base64
import hashlib
import io
import json
import math
import platform
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
import torch
from evaluation_cases import history, random_case
from matplotlib.figure import Figure
from PIL import Image

import bayes_kf
from bayes_kf import evaluation as ev
from bayes_kf.evaluation.report.contents import FigureSpec, Sections
from bayes_kf.evaluation.report.figures import draw_sheet
from bayes_kf.evaluation.report.inline_figures import LARGEST_SVG
from bayes_kf.evaluation.report.provenance import fingerprint
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.report.score_labels import known_label
from bayes_kf.evaluation.report.sortable_tables import make_table
from bayes_kf.evaluation.score import Interval, Score
from bayes_kf.evaluation.sections.verdicts.regression import pit_verdict


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


def test_a_score_has_its_interval_and_its_null_band(report):
    numbers, gap = report.scores, report.score("confidence_gap")
    assert gap == Score(
        numbers["confidence_gap"],
        Interval(numbers["confidence_gap_low"], numbers["confidence_gap_high"]),
        Interval(numbers["confidence_gap_null_low"], numbers["confidence_gap_null_high"]),
        numbers["confidence_gap_null_mean"],
        numbers["confidence_gap_p_value"],
    )
    assert report.score("aurc") == Score(numbers["aurc"])
    for wrong, hint in (("ece_low", "."), ("acuracy", "; did you mean 'accuracy'?")):
        with pytest.raises(
            ValueError, match=rf"^`name` must be a score of this report, got '{wrong}'{re.escape(hint)}"
        ):
            report.score(wrong)


def test_scores_of_the_stream_are_those_of_all_of_it(report):
    losses = history()["log_loss"].double()
    assert report.scores["prequential_log_loss"] == pytest.approx(float(losses.mean()))
    nis, dof = history()["innovation"].double(), history()["dof"]
    assert report.scores["innovation_ratio"] == pytest.approx(float(nis.sum() / dof.sum()))
    assert len(nis) < 100
    assert "innovation_whiteness_p" not in report.scores  # of so few updates it would be wrong too often
    probs, targets = random_case()
    longer = {"innovation": nis.repeat(4), "dof": dof.repeat(4)}
    actual = ev.evaluate_predictions(probs, targets, history=longer, num_simulations=39).scores
    assert actual["innovation_whiteness_p"] == ev.innovation_whiteness(nis.repeat(4), dof.repeat(4), 10).p_value


@pytest.mark.parametrize(
    ("name", "statistic", "binning", "kind"),
    [
        ("ece", "ece", "equal_width", "confidence"),
        ("ece_equal_mass", "ece", "equal_mass", "confidence"),
        ("ece_classwise", "ece", "equal_width", "classwise"),
        ("mce", "mce", "equal_width", "confidence"),
        ("confidence_gap", "gap", "equal_width", "confidence"),
    ],
)
def test_every_calibration_score_has_its_band(report, name, statistic, binning, kind):
    test = ev.calibration_test(*random_case(), statistic, binning=binning, kind=kind, num_simulations=200)
    actual = [report.scores[name + suffix] for suffix in ("", "_null_mean", "_null_low", "_null_high", "_p_value")]
    assert actual == list(test)


def test_titles_on_the_sheet_are_free_of_legends(report):
    sheet = draw_sheet("all", report.sections.drawings)
    sheet.savefig(io.BytesIO())  # sets the layout
    titles = [part._suptitle.get_window_extent() for part in sheet.subfigs if part.axes]
    legends = [a.get_legend().get_window_extent() for a in sheet.axes if a.get_legend()]
    labels = [a.xaxis.label.get_window_extent() for a in sheet.axes if a.get_xlabel()]
    assert len(titles) >= 3
    assert len(legends) >= 2
    assert not any(text.overlaps(legend) for text in titles + labels for legend in legends)


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


@pytest.mark.parametrize("suffix", [".html", ".json", ".png"])
def test_an_earlier_report_is_replaced_and_nothing_else(suffix, tmp_path):
    page, plain = tmp_path / "r.html", Report("Nothing", {}, Sections())
    report = figure_of(lambda ax: ax.plot([1, 2]))
    (tmp_path / "notes").write_text("x")
    report.save(page)
    plain.save(page)  # without figures: the sheet of the other goes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "r.html", "r.json"]
    report.save(page)
    mine = page.with_suffix(suffix)
    content = {".html": b"<html></html>", ".json": b'{"scores": {}, "title": "mine"}', ".png": None}[suffix]
    if content is None:
        Image.new("L", (3, 3)).save(mine)
    else:
        mine.write_bytes(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for actual in (report, plain):
        with pytest.raises(ValueError, match=rf"`path` must be a new name .*, where r\{suffix} belongs to no report"):
            actual.save(page)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_a_report_that_cannot_be_drawn_leaves_the_earlier_one(report, tmp_path, monkeypatch):
    Report("Nothing", {}, Sections()).save(tmp_path / "r.html")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space left"):
        report.save(tmp_path / "r.html")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_page_asks_for_nothing_and_can_be_read_without_seeing(report):
    html = report.to_html()
    page = Page(html)
    places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert attributes.keys().isdisjoint({"srcset", "action", "background"})
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#main").removeprefix("#") in places
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    images = page.all("svg")
    assert len(images) == len(report.figures) >= 5
    assert all(image["role"] == "img" and len(image["aria-label"]) > 30 for image in images)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(attributes.get("scope") in {"row", "col", "rowgroup"} for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_no_script_may_run_but_the_pages_own(report):
    html = report.to_html()
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, flags=re.DOTALL)
    policy = next(tag["content"] for tag in Page(html).all("meta") if "http-equiv" in tag)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize("ground", [0, 1])
def test_text_stands_out_from_its_ground(ground):
    """Of the light page and of the dark one: every colour of text on both grounds, at level AA of the WCAG."""
    css = (resources.files("bayes_kf.evaluation.report") / "templates" / "report.css").read_text("utf-8")

    def luminance(colour):
        digits = "".join(digit * 2 for digit in colour) if len(colour) == 3 else colour
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    roots = re.findall(r":root \{([^}]*)\}", css)
    assert len(roots) == 3  # light, dark, print
    named = {name: luminance(colour) for name, colour in re.findall(r"--(\w+): #([0-9a-f]{3,6})", roots[ground])}
    assert not re.search(r"[\s;{](?:color|background): #", css.replace(roots[2], ""))  # all by name
    for surface in ("ground", "soft"):
        for text in ("text", "muted", "link", "yes", "partly", "no", "few"):
            low, high = sorted((named[surface], named[text]))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (surface, text)


def test_figures_are_in_the_page_in_its_colours(report):
    """Text stays text, black and white are the page's own, and identifiers are used or gone."""
    html = report.to_html()
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == len(report.figures)
    for figure in figures:
        assert "#000000" not in figure
        assert "#ffffff" not in figure
        assert "currentColor" in figure
    identifiers = re.findall(r' id="([^"]+)"', "".join(figures))
    assert len(set(identifiers)) == len(identifiers)
    assert all(f"#{name}" in html for name in identifiers)
    assert "confidence</text>" in figures[0]


def test_points_of_the_diagram_say_what_they_are(report):
    figure = re.search(r"<svg.*?</svg>", report.to_html(), flags=re.DOTALL)[0]
    groups = re.split(r'data-part="', figure)[1:]
    tips = {}
    for group in groups:
        tips.setdefault(group.split('"')[0], []).extend(re.findall(r"<title>(confidence [^<]*)</title>", group))
    counts = {
        part: [int(re.search(r"([\d,]+) examples", tip)[1].replace(",", "")) for tip in texts]
        for part, texts in tips.items()
    }
    spec = report.sections.drawings["reliability"]
    assert len(counts["0"]) == len(spec.table.rows)
    assert sum(counts["0"]) == 200
    shown = [sum(counts[str(number)]) for number in range(1, len(spec.parts) + 1)]
    assert [f"{count} of them" for count in shown] == [part.note.split(";")[0] for part in spec.parts]


def test_names_are_text_not_markup(report):
    html = report.to_html()
    page = Page(html)
    assert len(page.all("script")) == 1
    assert page.all("b") == []
    assert "<script>alert(1)</script>" in page.text
    assert "<b>Digits</b>" in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_dollars_in_titles_are_no_mathematics(tmp_path):
    probs, targets = random_case(20)
    ood = {"a $5 bill": probs, "_x": probs}
    report = ev.evaluate_predictions(probs, targets, ood=ood, title=r"costs $\bad$", num_simulations=39)
    assert report.save(tmp_path / "report.html").exists()
    compared = ev.report_comparison({"$a^$": probs, "costs $": probs}, targets, num_simulations=39)
    assert compared.save(tmp_path / "compared.html").exists()


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
    assert content["not_finite"]["nll"] == "inf"
    assert {name for name, value in content["scores"].items() if value is None} == set(content["not_finite"])
    assert "At least one label has predicted probability zero" in report.to_html()
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
    assert first[0.5].startswith("Miscalibrated, under-confident on average: the smooth calibration error is 0.")
    assert first[1.0].startswith("No miscalibration detected: ")
    assert re.match(
        r"Miscalibrated, over-confident on average: .* 0\.\d+, above its null band of 0\.\d+ to 0\.\d+ \(2,000 targets",
        first[2.0],
    )


@pytest.mark.parametrize(("num_examples", "num_classes"), [(1, 2), (3, 100)])
def test_small_and_wide_cases_have_a_page(num_examples, num_classes):
    probs, targets = random_case(num_examples, num_classes)
    html = ev.evaluate_predictions(probs, targets, num_simulations=39).to_html()
    assert "not defined" in Page(html).text  # recall of a class that never came


def test_wrong_number_of_class_names_is_refused():
    with pytest.raises(ValueError, match=r"^`class_names` must hold 3 names, got 2\.$"):
        ev.evaluate_predictions(*random_case(), class_names=["a", "b"])


def figure_of(draw, **settings) -> Report:
    drawings = {"figure": FigureSpec("A figure", "What it shows", draw, **settings)}
    return Report("t", {}, Sections(drawings=drawings))


def test_data_of_a_figure_stand_under_it_and_not_twice():
    data, other = make_table("Some data", ("x", "y"), [(1, 2)]), make_table("Other data", ("x",), [(3,)])
    report = figure_of(lambda ax: ax, table=data)
    report.sections.tables += [data, other]
    html = report.to_html()
    figure = html[html.index("<figure>") : html.index("</figure>")]
    assert "Data of this figure" in figure
    assert '<td class="number" data-value="2">2</td>' in figure
    assert "Some data" not in html.replace(figure, "")
    assert "Other data" in html[html.index('id="details"') :]


def test_open_tables_stand_before_the_scores():
    table = make_table("Side by side", ("Model", "Score"), [("<a>", 0.5)], is_open=True)
    html = Report("t", {}, Sections(scores={"ece": Score(0.1)}, tables=[table])).to_html()
    assert html.index("<details open>") < html.index("&lt;a&gt;") < html.index('<h2 id="scores">')
    assert 'id="details"' not in html


def test_a_figure_of_many_paths_is_pixels():
    points = np.random.default_rng(0).random((2, 20_000))
    few, many = (figure_of(lambda ax, n=n: ax.scatter(*points[:, :n])) for n in (10, 20_000))
    assert Page(few.to_html()).all("img") == []
    assert len(Page(few.to_html()).all("svg")) == 1
    (image,) = Page(many.to_html()).all("img")
    assert image["src"].startswith("data:image/png;base64,")
    assert len(image["src"]) < 2 * LARGEST_SVG


def test_a_report_may_have_no_part_at_all(tmp_path):
    path = Report("Nothing", {}, Sections()).save(tmp_path / "nothing.html")
    page = Page(path.read_text("utf-8"))
    assert [tag for tag, _ in page.tags if tag in {"h1", "h2"}] == ["h1", "h2", "h2"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["nothing.html", "nothing.json"]


def test_odd_characters_do_not_stop_a_page(tmp_path):
    title = "bad \udcff name, \x00, \u202e, 猫"  # as file names that are not UTF-8 come in
    path = Report(title, {}, Sections(verdict=["\ud800"])).save(tmp_path / "odd.html")
    assert "猫" in path.read_text("utf-8")
    assert json.loads(path.with_suffix(".json").read_text("utf-8"))["title"].endswith("猫")


def test_fingerprints_and_versions_are_on_the_page_and_in_the_file():
    report = Report("t", {}, Sections(), fingerprints={"predictions": "<abc>", "torch": "0.1 of then"})
    origin = json.loads(report.to_json())["fingerprints"]
    wanted = {"predictions": "<abc>", "torch": "0.1 of then", "bayes_kf": bayes_kf.__version__}
    assert origin == wanted | {"numpy": np.__version__, "python": platform.python_version()}
    assert all(text in Page(report.to_html()).text for text in origin.values())


def test_fingerprints_of_predictions_and_targets(report):
    probs, targets = random_case()
    assert report.fingerprints["predictions"] == fingerprint(probs)
    assert report.fingerprints["targets"] == fingerprint(targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_numbers_have_the_same_fingerprint(dtype):
    values = torch.tensor([[0.5, -0.25, 0.0], [1.0, 2.0, math.inf]], dtype=dtype)
    wanted = hashlib.sha256(b"(2, 3)" + np.array([0.5, -0.25, 0, 1, 2, math.inf], "<f8").tobytes()).hexdigest()
    assert fingerprint(values) == wanted
    assert fingerprint(values.T.contiguous().T) == wanted
    if dtype != torch.bfloat16:
        assert fingerprint(np.asfortranarray(values.numpy())) == wanted


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_fingerprints_of_integers(dtype):
    wanted = hashlib.sha256(b"(3,)" + np.array([1, 0, 2], "<i8").tobytes()).hexdigest()
    assert fingerprint(torch.tensor([1, 0, 2], dtype=dtype)) == wanted
    assert fingerprint(torch.tensor([1, 0, 2]).double()) != wanted


def test_fingerprints_tell_shapes_and_single_bits_apart():
    values = torch.rand(4, 6, dtype=torch.float64)
    other = values.clone()
    other[3, 5] = np.nextafter(other[3, 5].item(), 2)
    actual = {fingerprint(x) for x in (values, other, values.reshape(6, 4), values.flatten(), values[:0], values[0, 0])}
    assert len(actual) == 6
    with pytest.raises(ValueError, match=r"^`array` must hold real numbers, got torch\.complex64\.$"):
        fingerprint(torch.zeros(2, dtype=torch.complex64))


def test_every_score_of_a_report_has_a_label(report):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, generator=generator)
    regression = ev.evaluate_regression(mean, mean + 1, variance=torch.ones(50), num_simulations=39)
    wide = ev.evaluate_predictions(*random_case(60, 12), ordered=True, num_simulations=39)
    for made in (report, wide, regression):
        assert [name for name in made.sections.scores if known_label(name) is None] == []


def test_unknown_scores_are_shown_as_they_are():
    page = Page(Report("t", {}, Sections(scores={"<mine>": Score(0.25, Interval(0.125, 0.5))})).to_html())
    assert {"Other scores", "<mine>", "0.2500", "0.1250 to 0.5000"} <= set(page.text)


def test_of_very_many_classes_those_are_listed_that_are_most_wrong():
    probs = torch.full((30, 1200), 1.0 / 1200)
    probs[:, 7] += 0.3
    probs /= probs.sum(1, keepdim=True)
    labels = torch.arange(30) + 1100
    html = ev.evaluate_predictions(probs, labels, num_simulations=60).to_html()
    start = html.index("Class by class: 1,000 of 1,200, whose share and mean probability differ most")
    rows = re.findall(r"<tr>\s*<t[hd][^>]*>(?:<[^>]+>)*([^<]*)<", html[start:])[1:1001]
    assert [int(name) for name in rows] == sorted(map(int, rows))
    assert {"7", *map(str, range(1100, 1130))} <= set(rows)
    assert len(set(rows)) == 1000


def test_more_log_probabilities_than_labels_are_refused():
    probs, targets = random_case()
    log_prob = probs.gather(1, targets[:, None])[:, 0].log()
    with pytest.raises(ValueError, match=r"^`log_prob` must have at most 200 values, one a target, got 400\.$"):
        ev.evaluate_predictions(probs, targets, log_prob=log_prob.repeat(2), num_simulations=39)


@pytest.mark.parametrize(
    ("p_value", "statistic", "high", "start"),
    [
        (0.06, 0.2, 0.05, "No deviation of the PIT values from uniform detected (Kolmogorov-Smirnov p"),
        (0.06, 0.2, 0.1, "Too few targets to tell whether the PIT values are uniform (Kolmogorov-Smirnov p"),
        (0.04, 0.05, 0.1, "The PIT values are not uniform"),
        (0.03, 0.2, 0.1, "The PIT values are not uniform"),
    ],
)
def test_the_p_value_decides_whether_pit_values_are_uniform(p_value, statistic, high, start):
    score = Score(statistic, null_band=Interval(0.0, high), p_value=p_value)
    assert pit_verdict(score, 0.0, 0.0).startswith(start)


@pytest.mark.parametrize("length", [1, 2, 8, 60, 400])
def test_curves_of_a_short_stream_are_seen(length):
    """A curve of one point, or a window as long as the stream, would leave the figures blank."""
    probs, targets = random_case()
    generator = torch.Generator().manual_seed(0)
    recorded = {
        "log_loss": torch.rand(length, generator=generator),
        "correct": torch.ones(length),
        "innovation": torch.rand(length, generator=generator) + 0.5,
        "dof": torch.ones(length),
    }
    report = ev.evaluate_predictions(probs, targets, history=recorded, num_simulations=50)
    line = report.figures["innovation"].axes[0].get_lines()[0]
    assert np.isfinite(line.get_ydata()).all()
    if length == 1:
        assert line.get_marker() == "o"
    else:
        assert len(line.get_xdata()) >= max(2, 0.8 * length)
    for axes in report.figures["online"].axes:
        curve = axes.get_lines()[0]
        assert len(curve.get_xdata()) >= max(2, 0.8 * length) or curve.get_marker() == "."
    assert len(report.sections.drawings["innovation"].table.rows) == min(20, len(line.get_xdata()))


def test_tables_can_be_pasted():
    probs, targets = random_case()
    report = ev.report_comparison({"a_b": probs, "c|d": probs.flip(1)}, targets, num_simulations=39)
    table = report.tables["Models side by side; place 1: no model is clearly better"]
    lines = table.to_markdown().splitlines()
    assert len(lines) == 4
    assert lines[3].startswith(r"| c\|d |")
    assert f"{report.scores['a_b/nll']:.4f}" in lines[2]
    latex = table.to_latex().splitlines()
    assert latex[0] == r"\begin{tabular}{l" + "r" * (len(table.header) - 1) + "}"
    assert latex[4].startswith(r"a\_b & ")
    assert all(line.endswith(r"\\") for line in (latex[2], latex[4], latex[5]))
    special = make_table("t", ("~^",), [("−1 % & {x} \\y",)]).to_latex().splitlines()
    assert special[2] == r"\textasciitilde{}\textasciicircum{} \\"
    assert special[4] == r"$-$1 \% \& \{x\} \textbackslash{}y \\"
    assert "Negative log-likelihood: differences" in report.tables


def test_the_scores_as_a_table(report):
    table = report.to_pandas()
    assert list(table.index) == list(report.sections.scores)
    for name in ("ece", "accuracy", "spiegelhalter"):
        score = report.score(name)
        assert table.loc[name, "value"] == score.value
        assert math.isnan(table.loc[name, "low"]) == (score.interval is None)
        assert math.isnan(table.loc[name, "p_value"]) == (score.p_value is None)
    assert table.loc["ece", "null_high"] == report.scores["ece_null_high"]


def test_notebooks_show_the_page_in_a_frame_of_its_own(report):
    frames = Page(report._repr_html_()).all("iframe")
    assert len(frames) == 1
    assert frames[0]["srcdoc"] == report.to_html()
    assert frames[0]["title"] == report.title


def test_repr_is_short():
    probs, targets = random_case()
    report = ev.evaluate_predictions(probs, targets, history=history(), num_simulations=50, title="Ours, again")
    text = repr(report)
    assert len(text) < 200
    assert "\n" not in text
    assert text.startswith("Report('Ours, again', examples: 200, ")
    assert f"accuracy: {report.scores['accuracy']:.4g}" in text
    assert f"nll: {report.scores['nll']:.4g}" in text
