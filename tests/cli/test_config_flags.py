"""Settings of ``bayes-kf fit`` from YAML files."""

import argparse
import json
import os
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from cli_inputs import run, write_inputs

from bayes_kf import KalmanConfig, Posterior
from bayes_kf.cli import main
from bayes_kf.cli.base_model import load_base, model_folder
from bayes_kf.cli.config_flags import add_setting_flags, read_settings
from bayes_kf.inference.config_schema import config_schema

PUBLISHED = Path(__file__).parents[2] / "bayes_kf" / "inference" / "kalman_config.schema.json"


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
    config = settings(path, "--forgetting", "0.9", "--seed", "7")
    assert (config.forgetting, config.seed, config.covariance) == (0.9, 7, "diagonal")


def test_words_name_settings():
    assert settings("stream") == KalmanConfig.stream()
    assert settings("dataset", "--covariance-rank", "9") == KalmanConfig.dataset(rank=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "covariance: diagonal\nforgeting: 0.9\n",
            r"`--config` must hold settings of .*, got 'forgeting' in .*, line 2; did you mean 'forgetting'\?$",
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


def test_the_published_schema_is_the_present_one():
    assert json.loads(PUBLISHED.read_text()) == config_schema()
    jsonschema.Draft202012Validator.check_schema(config_schema())


@pytest.mark.parametrize("config", [KalmanConfig(), KalmanConfig.loko(), KalmanConfig.dataset(), KalmanConfig.stream()])
def test_saved_settings_fit_the_schema(config, tmp_path):
    config.save_pretrained(tmp_path)
    jsonschema.validate(json.loads((tmp_path / "kalman_config.json").read_text()), config_schema())


@pytest.mark.parametrize(
    "text",
    [
        "forgeting: 0.9",
        "covariance: dense",
        "rank: 0",
        "rank: 2.5",
        "damping: 1",
        "temperature: cold",
        "noise_variance: -1",
        "tune: {}",
        "tune: {rank: 3}",
        "outputs_per_pass: many",
    ],
)
def test_what_the_schema_refuses_the_settings_refuse(text, tmp_path):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), config_schema())
    path = tmp_path / "filter.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=text.partition(":")[0]):
        settings(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fi"], {"fit"}),
        (["fit", "--cov"], {"--covariance", "--covariance-rank"}),
        (["fit", "--covariance", "diag"], {"diagonal", "diagonal_information", "diagonal_mixed"}),
        (["evaluate", "--recal"], {"--recalibrate"}),
    ],
)
def test_bash_completes(words, expected, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    line = " ".join(f"'{word}'" for word in ("bayes-kf", *words))
    ask = f"""
        source {script}
        COMP_WORDS=({line}); COMP_CWORD={len(words)}
        $(complete -p bayes-kf | sed 's/.*-F \\([^ ]*\\).*/\\1/') bayes-kf "${{COMP_WORDS[-1]}}" ""
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    completed = subprocess.run(
        ["bash", "-c", ask], capture_output=True, text=True, env=os.environ, check=True, timeout=60
    )
    assert set(completed.stdout.split()) == expected, completed.stderr


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_base_is_of_the_dtype_asked_for(dtype, tmp_path):
    folder = write_inputs(tmp_path)
    given = ("--model", "digits-vit", "--dtype", dtype)
    run("fit", *given, "--data", folder / "digits.npz", "--batch-size", 8, "--output", tmp_path / "posterior")
    base = load_base(model_folder("digits-vit"), "image", 10, 0, dtype)
    posterior = Posterior.from_pretrained(tmp_path / "posterior", base.model)
    assert str(base.model.vit.layernorm.weight.dtype) == f"torch.{dtype}"
    assert posterior.adapter.dtype.itemsize >= 4
    page = tmp_path / "report.html"
    run("evaluate", tmp_path / "posterior", *given, "--data", folder / "heldout.npz", "--output", page)
    assert json.loads(page.with_suffix(".json").read_text())["scores"]["accuracy"] > 0.5
