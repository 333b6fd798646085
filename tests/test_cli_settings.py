"""Settings of ``bayes-kf fit`` from YAML files."""

import argparse

import pytest

from bayes_kf import KalmanConfig
from bayes_kf.cli.settings import add_setting_flags, read_settings


def settings(path, *flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    add_setting_flags(parser)
    return read_settings(parser.parse_args(["--config", str(path), *flags]))


def test_a_yaml_file_says_what_the_settings_are(tmp_path):
    path = tmp_path / "filter.yaml"
    path.write_text(
        "# of our stream\ncovariance: diagonal\ndrift_variance: 1e-4  # text to YAML\nforgetting: 0.99\n"
        "damping: no\ngate_quantile: null\nbytes_budget: none\ntune:\n  initial_logit_sd: [3, 1.0]\n  rank: [5, 10]\n"
    )
    expected = KalmanConfig(
        covariance="diagonal",
        drift_variance=1e-4,
        forgetting=0.99,
        damping=False,
        tune={"initial_logit_sd": [3, 1.0], "rank": [5, 10]},
    )
    assert settings(path) == expected
    found = settings(path, "--forgetting", "0.9", "--seed", "7")
    assert (found.forgetting, found.seed, found.covariance) == (0.9, 7, "diagonal")


def test_words_name_settings():
    assert settings("stream") == KalmanConfig.stream()
    assert settings("dataset", "--covariance-rank", "9") == KalmanConfig.dataset(rank=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "covariance: diagonal\nforgeting: 0.9\n",
            r"must hold fields among likelihood, .*got 'forgeting' in .*, line 2\.$",
        ),
        ("rank: 3\n\nrank: 4\n", r"must hold a field once, got 'rank' again in .*, line 3\.$"),
        ("rank: 3\nforgetting: 1.5\n", r"`forgetting` must lie in \(0, 1\], got 1\.5 \(.*filter\.yaml, line 2\)\.$"),
        ("rank: [3\ndamping: yes\n", r"`--config` must be YAML, got .*, line 2: "),
        ("rank: 3\n\tdamping: yes\n", r"`--config` must be YAML, got .*, line 2: found character '\\t'"),
        ("- rank\n", r"must hold a mapping from settings to values, got .*filter\.yaml\.$"),
        ("", r"must hold a mapping from settings to values"),
        (
            "rank: !!python/object/apply:os.system ['true']\n",
            r"`--config` must be YAML, got .*, line 1: could not determ",
        ),
        ("tune: {seed: [1, 2]}\n", r"`tune` must name settings that a stream can choose, got 'seed' \(.*line 1\)\.$"),
    ],
)
def test_an_error_names_the_line(text, message, tmp_path):
    path = tmp_path / "filter.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        settings(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"`--config` must be a readable YAML file, got .*nothing\.yml"):
        settings(tmp_path / "nothing.yml")
    (tmp_path / "latin.yml").write_bytes(b"rank: \xff\n")
    with pytest.raises(ValueError, match=r"`--config` must be a readable YAML file, got .*latin\.yml"):
        settings(tmp_path / "latin.yml")


def test_a_flag_that_is_wrong_is_not_the_files_line(tmp_path):
    path = tmp_path / "filter.yaml"
    path.write_text("forgetting: 0.9\n")
    with pytest.raises(ValueError, match=r"`forgetting` must lie in \(0, 1\], got 3 \(.*filter\.yaml\)\.$"):
        settings(path, "--forgetting", "3")
