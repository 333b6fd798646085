"""Nothing that comes in files is run: no pickles, no code of models, no paths out of a folder."""

import ast
import contextlib
import json
from pathlib import Path

import pytest
import torch
from cli_inputs import run, write_bert
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bayes_kf as bkf
from bayes_kf.data.text import text_tokenizer
from bayes_kf.files.checksums import verify_checksums
from bayes_kf.models.zoo import digits_vit, lora_digits_vit

PACKAGE = Path(bkf.__file__).parent
REPOSITORY = Path(__file__).parents[1]
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}  # modules whose loads run what they read
FORBIDDEN = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"}
FORBIDDEN |= {"pickle.load", "pickle.loads", "joblib.load", "torch.hub.load", "marshal.loads", "shelve.open"}


def calls():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_the_package_calls_nothing_that_runs_what_it_reads():
    seen = 0
    for path, name, keywords in calls():
        seen += 1
        assert name not in FORBIDDEN, f"{path} calls {name}"
        assert keywords.get("shell", "False") == "False", f"{path} starts a shell"
        assert keywords.get("trust_remote_code", "False") == "False", f"{path} trusts the code of models"
        if name.endswith("np.load"):
            assert keywords["allow_pickle"] == "False"
        if name.endswith(("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "].from_pretrained")):
            assert keywords.get("trust_remote_code") == "False", f"{path}: {name} leaves it open"
    assert seen > 5000


def test_no_code_of_the_repository_loads_pickles():
    """The package imports no unpickler under any name; scripts, tutorials and benchmarks call none of their loads."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not UNPICKLERS & {name.split(".")[0] for name in names}, f"{path} imports {names}"
    folders = [REPOSITORY / name for name in ("scripts", "tutorials", "benchmarks")]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(paths) > 100
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in FORBIDDEN, f"{path} calls {name}"
            if name == "np.load":
                assert keywords.get("allow_pickle") == "False", f"{path} leaves pickles open"


def evil(folder, marker):
    """Code that a model's folder brings along."""
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import BertConfig, BertForSequenceClassification, BertTokenizer\n"
        "class EvilConfig(BertConfig):\n    model_type = 'evil'\n"
        "class EvilModel(BertForSequenceClassification):\n    config_class = EvilConfig\n"
        "class EvilTokenizer(BertTokenizer):\n    pass\n"
    )


def test_a_model_that_brings_code_is_refused(tmp_path, capsys):
    write_bert(tmp_path / "bert")
    marker = tmp_path / "it-ran"
    evil(tmp_path / "bert", marker)
    path = tmp_path / "bert" / "config.json"
    mapped = {"AutoConfig": "evil.EvilConfig", "AutoModelForSequenceClassification": "evil.EvilModel"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "evil", "auto_map": mapped}))
    (tmp_path / "data.csv").write_text("text,label\na good film,good\nawful,bad\n")
    words = ("fit", "--model", tmp_path / "bert", "--data", tmp_path / "data.csv", "--output", tmp_path / "out")
    assert run(*words) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_brings_code_is_not_run(tmp_path):
    write_bert(tmp_path / "bert")
    marker = tmp_path / "it-ran"
    evil(tmp_path / "bert", marker)
    path = tmp_path / "bert" / "tokenizer_config.json"
    mapped = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "EvilTokenizer", "auto_map": mapped}))
    with contextlib.suppress(ValueError, OSError):  # refused, or read as what transformers knows
        text_tokenizer(tmp_path / "bert")
    assert not marker.exists()


@pytest.fixture
def folder(tmp_path):
    kf = bkf.KalmanFilter(lora_digits_vit(rank=2), bkf.KalmanConfig(rank=2))
    posterior = bkf.Posterior(kf, kf.init(torch.zeros(2, 1, 28, 28)))
    posterior.save_pretrained(tmp_path / "posterior")
    return tmp_path / "posterior"


def test_an_adapter_of_a_posterior_imports_nothing(folder, tmp_path, monkeypatch):
    evil(tmp_path, tmp_path / "it-ran")
    monkeypatch.syspath_prepend(tmp_path)
    path = folder / "adapter_config.json"
    mapped = {"auto_mapping": {"base_model_class": "EvilModel", "parent_library": "evil"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | mapped))
    bkf.Posterior.from_pretrained(folder, digits_vit())
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "a.b", "", 3])
def test_an_adapters_name_is_no_path(name, folder):
    path = folder / "kalman_state.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["bayes_kf"])
    save_file(load_file(path), path, metadata={"bayes_kf": json.dumps(metadata | {"adapter": name})})
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="`folder` must hold an adapter whose name can be a folder's, got"):
        bkf.Posterior.from_pretrained(folder, digits_vit())


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_checksums_stay_in_their_folder(name, folder):
    (folder.parent / "outside").write_text("x")
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(ValueError, match=r"`folder` must hold a valid SHA256SUMS, got line \d of"):
        verify_checksums(folder)
