"""Every field is checked when the settings are made, with one sentence; settings survive a round trip."""

import copy
import dataclasses
import json

import pytest
import torch

from bayes_kf.inference import Bank, KalmanConfig, KalmanFilter, config, config_schema
from bayes_kf.inference.covariance import structure

BAD = [
    (
        {"likelihood": "normal"},
        r"`likelihood` must be one of categorical, bernoulli, ordinal, gaussian, .*, tokens, got 'normal'\.",
    ),
    ({"covariance": "dense"}, r"`covariance` must be one of diagonal, .*, full, got 'dense'\."),
    ({"noise": "white"}, r"`noise` must be one of exponential_family, .* got 'white'\."),
    ({"expansion": "median"}, r"`expansion` must be one of mode, mean, got 'median'\."),
    ({"initial_rule": "normal"}, r"`initial_rule` must be one of constant, uniform, got 'normal'\."),
    (
        {"initial_spread": "equal"},
        r"`initial_spread` must be one of modules, tensors, constant, bounded, got 'equal'\.",
    ),
    ({"noise_variance": 0.0}, r"`noise_variance` must be positive and finite, got 0\.0\."),
    ({"noise_variance": "estimated"}, r"`noise_variance` 'estimated' needs `likelihood` 'gaussian' or 'student_t' and"),
    ({"student_dof": 2.0}, r"`student_dof` must be above 2 and finite, got 2\.0\."),
    ({"student_dof": "5"}, r"`student_dof` must be above 2 and finite, got '5'\."),
    (
        {"likelihood": "student_t", "noise": "ema_taylor"},
        r"`noise` must be 'exponential_family' for `likelihood` 'student_t', got 'ema_taylor'\.",
    ),
    (
        {"likelihood": "heteroscedastic_gaussian", "noise_variance": "estimated"},
        r"`noise_variance` must be left at 1 for `likelihood` 'heteroscedastic_gaussian', .* got 'estimated'\.",
    ),
    ({"initial_logit_sd": -1}, r"`initial_logit_sd` must be positive and finite, got -1\."),
    ({"lora_inputs": "white"}, r"`lora_inputs` must be one of peft, whitened, got 'white'\."),
    ({"temperature_margin": -0.1}, r"`temperature_margin` must be >= 0 and finite, got -0\.1\."),
    ({"initial_bias_sd": 0.0}, r"`initial_bias_sd` must be positive and finite, got 0\.0\."),
    ({"initial_variance": float("inf")}, r"`initial_variance` must be positive and finite, got inf\."),
    ({"initial_variance": 0}, r"`initial_variance` must be positive and finite, got 0\."),
    ({"beta": 1.0}, r"`beta` must lie strictly between 0 and 1, got 1\.0\."),
    ({"gate_quantile": 1.5}, r"`gate_quantile` must lie strictly between 0 and 1, got 1\.5\."),
    ({"forgetting": 0.0}, r"`forgetting` must lie in \(0, 1\], got 0\.0\."),
    ({"drift_variance": -0.1}, r"`drift_variance` must be >= 0 and finite, got -0\.1\."),
    ({"temperature": 0}, r"`temperature` must be positive and finite, got 0\."),
    ({"temperature": "auto"}, r"`temperature` must be positive and finite, got 'auto'\."),
    ({"softmax_temperature": 0}, r"`softmax_temperature` must be positive and finite, got 0\."),
    ({"softmax_temperature": "held_out"}, r"`softmax_temperature` must be positive and finite, got 'held_out'\."),
    (
        {"softmax_temperature": 0.5, "likelihood": "gaussian"},
        r"`softmax_temperature` must be 1 for `likelihood` .gaussian., which has no softmax, got 0\.5\.",
    ),
    ({"rank": 0}, r"`rank` must be a whole number >= 1, got 0\."),
    ({"damping": 1}, r"`damping` must be True or False, got 1\."),
    ({"seed": 1.5}, r"`seed` must be an integer, got 1\.5\."),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        KalmanConfig(**fields)


@pytest.mark.parametrize("config", [KalmanConfig(), KalmanConfig.loko(beta=0.9), KalmanConfig(temperature=0.5, rank=3)])
def test_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path / "new")
    assert KalmanConfig.from_pretrained(tmp_path / "new") == config


def test_an_earlier_versions_word_is_read_as_the_number_that_it_stood_for(tmp_path):
    (tmp_path / "kalman_config.json").write_text(json.dumps({"softmax_temperature": "held_out", "rank": 3}))
    assert KalmanConfig.from_pretrained(tmp_path) == KalmanConfig(rank=3, softmax_temperature=1.0)


def test_unknown_fields_are_named(tmp_path):
    (tmp_path / "kalman_config.json").write_text(json.dumps({"colour": "red"}))
    message = r"of this version's settings, got 'colour' in .*; the settings are likelihood, .*seed\.$"
    with pytest.raises(ValueError, match=message):
        KalmanConfig.from_pretrained(tmp_path)
    (tmp_path / "kalman_config.json").write_text(json.dumps({"rank": 3, "forgeting": 0.9}))
    with pytest.raises(ValueError, match=r"got 'forgeting' in .*; did you mean 'forgetting'\?$"):
        KalmanConfig.from_pretrained(tmp_path)
    (tmp_path / "kalman_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"with a JSON object, got list\."):
        KalmanConfig.from_pretrained(tmp_path)
    (tmp_path / "kalman_config.json").write_text(json.dumps({"beta": 2}))
    with pytest.raises(ValueError, match=r"`beta` must lie strictly"):
        KalmanConfig.from_pretrained(tmp_path)


def test_a_structure_can_be_registered(monkeypatch):
    table = dict(structure.STRUCTURES)
    monkeypatch.setattr(structure, "STRUCTURES", table)
    monkeypatch.setattr(config, "STRUCTURES", table)
    monkeypatch.setattr(config_schema, "STRUCTURES", table)
    with pytest.raises(ValueError, match=r"`covariance` must be one of diagonal, .*, got 'mine'"):
        KalmanConfig(covariance="mine")
    structure.register_structure("mine", table["diagonal"])
    assert KalmanConfig(covariance="mine").structure is table["diagonal"]
    assert "mine" in config_schema.config_schema()["properties"]["covariance"]["enum"]
    with pytest.raises(ValueError, match=r"`name` must be an identifier other than diagonal, .*, got 'mine'"):
        structure.register_structure("mine", table["full"])
    with pytest.raises(ValueError, match="`structure` must be a class with the methods of GaussianBelief, got dict"):
        structure.register_structure("other", {})
    methods = {name: getattr(table["full"], name) for name in structure.METHODS if name != "predict"}
    with pytest.raises(ValueError, match="of GaussianBelief, got one without predict"):
        structure.register_structure("other", type("NoPrediction", (), methods))


@pytest.mark.parametrize(
    ("fields", "nearest"),
    [
        ({"covariance": "low-rank"}, "low_rank"),
        ({"likelihood": "categorial"}, "categorical"),
        ({"tune": {"initial_logit_sds": [1.0]}}, "initial_logit_sd"),
    ],
)
def test_misspelt_words_have_a_suggestion(fields, nearest):
    with pytest.raises(ValueError, match=rf"; did you mean '{nearest}'\?$"):
        KalmanConfig(**fields)


def test_a_mapping_is_no_config():
    model, wrong = torch.nn.Linear(2, 2), {"covariance": "full"}
    with pytest.raises(ValueError, match=r"`config` must be a KalmanConfig, got dict; `KalmanConfig\(\*\*settings\)`"):
        KalmanFilter(model, wrong)
    with pytest.raises(ValueError, match=r"`config` must be a KalmanConfig, got dict; `KalmanConfig\(\*\*settings\)`"):
        KalmanFilter(model, {})
    with pytest.raises(ValueError, match=r"`configs` must be a KalmanConfig, got dict"):
        Bank(model, [wrong])


def test_a_misspelt_setting_has_a_suggestion():
    with pytest.raises(TypeError, match=r"KalmanConfig has no setting 'forgeting'; did you mean 'forgetting'\?"):
        KalmanConfig(forgeting=0.9)
    with pytest.raises(TypeError, match="KalmanConfig has no setting 'zzzz'"):
        dataclasses.replace(KalmanConfig(), zzzz=1)
    config = KalmanConfig(rank=3)
    assert copy.deepcopy(config) == copy.copy(config) == dataclasses.replace(config) == config


def test_every_setting_belongs_to_a_group_by_its_own_name_and_is_documented():
    config = KalmanConfig.loko(rank=7, seed=3, temperature=0.5, tune_margin=2.0)
    groups = {name: getattr(config, name) for name in dir(KalmanConfig) if name.endswith("_settings")}
    assert len(groups) == 7
    grouped = [(f.name, getattr(group, f.name)) for group in groups.values() for f in dataclasses.fields(group)]
    assert dict(grouped) == dataclasses.asdict(config)
    assert all(value == getattr(config, name) for name, value in grouped)  # those in several groups
    for field in dataclasses.fields(config):
        assert f"{field.name}: {field.metadata['help']}" in KalmanConfig.__doc__
