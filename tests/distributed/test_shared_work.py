"""The same call on several processes: every kind of fit ends as on one, whatever the number of processes."""

import os
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM

import bayes_kf as bkf
from bayes_kf import distributed, evaluation
from bayes_kf.processes import launched

from . import cases
from .processes import run

N = 90
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X @ torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).argmax(1)
BATCHES = list(zip(X.split(11), Y.split(11), strict=True))  # the last one has 2 examples


def loader(shuffle=True):
    return DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=shuffle)


def text():
    """A small language model with LoRA, and batches with padding and prompts that are not learned."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    ).double()  # fmt: skip
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (24, 8), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[::3, 6:] = 0
    labels[mask == 0] = -100
    labels[:, :3] = -100
    parts = zip(ids.split(4), mask.split(4), labels.split(4), strict=True)
    return model, [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in parts]


def fitted(kind):
    """A posterior by one kind of fit."""
    model, config = cases.network(), bkf.KalmanConfig
    torch.manual_seed(5 + (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0))  # shuffles
    if kind == "default":
        return bkf.fit(model, loader(), progress=False)
    if kind == "candidates":
        candidates = [config(initial_logit_sd=1.0), config(covariance="diagonal", curvature="sampled", mean_passes=1)]
        return bkf.fit(model, loader(), candidates, progress=False)
    if kind == "passes":
        return bkf.fit(model, BATCHES, config(passes=2, mean_passes=2, rank=10), progress=False)
    if kind == "truncated":
        settings = config(covariance="full", curvature="truncated", curvature_classes=2, gradient_penalty=0.01)
        return bkf.fit(model, BATCHES, settings, progress=False)
    if kind == "trained":
        return bkf.fit(model, BATCHES[:6], start="trained", held_out=BATCHES[6:], progress=False)
    if kind == "stream":
        return bkf.fit(model, iter(BATCHES), held_out="latest", progress=False)
    if kind == "tune":
        return bkf.fit(model, iter(BATCHES), config.stream(), progress=False)
    if kind == "regression":
        head = nn.Linear(5, 1).double()
        nn.init.constant_(head.weight, 0.1)
        nn.init.zeros_(head.bias)
        return bkf.fit(head, [(x, x.sum(1, keepdim=True).sin()) for x, _ in BATCHES], progress=False)
    assert kind == "text"
    return bkf.fit(
        *text(), bkf.KalmanConfig(likelihood="tokens", curvature="sampled", rank=5, mean_passes=1), progress=False
    )


KINDS = ("default", "candidates", "passes", "truncated", "trained", "stream", "tune", "regression", "text")


def results(rank, kinds):
    """The numbers of each kind of fit, of its predictions and of its calibration."""
    found = {}
    for kind in kinds:
        posterior = fitted(kind)
        members = getattr(posterior, "members", (posterior,))
        for number, member in enumerate(members):
            found[f"{kind} mean {number}"] = member.mean_vector
            found[f"{kind} variance {number}"] = member.kf.marginal_variance(member.state)
            found |= {f"{kind} {name} {number}": series for name, series in member.history.items() if name != "seconds"}
        if kind in ("default", "passes"):
            predicted = posterior.predict_loader(BATCHES)
            found |= {f"{kind} probs": predicted.probs, f"{kind} epistemic": predicted.epistemic}
            found[f"{kind} sampled"] = posterior.predict_loader(BATCHES, method="sampled", num_samples=4).probs
            found[f"{kind} calibrated"] = posterior.calibrate(BATCHES[:5]).predict(X).probs
            scores = evaluation.evaluate(posterior, BATCHES, num_simulations=50).scores
            found |= {f"{kind} {name}": torch.tensor(scores[name]) for name in ("nll", "accuracy", "ece")}
    return found


@pytest.mark.parametrize(
    ("size", "kinds"),
    [(2, KINDS), pytest.param(3, KINDS, marks=pytest.mark.slow), pytest.param(4, KINDS[:3], marks=pytest.mark.slow)],
)
def test_every_kind_of_fit_equals_that_of_one_process(size, kinds, tmp_path):
    expected = results(0, kinds)
    for found in run(size, results, tmp_path, kinds):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            where = partial("{}: {}".format, name)
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=where)


def looped(rank):
    """A loop of one's own over a bank, and predictions between."""
    bank = bkf.Bank(cases.network(), [bkf.KalmanConfig(forgetting=0.99), bkf.KalmanConfig(covariance="diagonal")])
    with distributed.together():
        state = bank.init(X[:20])
        for inputs, targets in BATCHES[:4]:
            state, _ = bank.update(state, inputs, targets)
        probs = bank.predict(state, X[60:]).probs
    return {"weights": bank.weights(state), "probs": probs}


def test_a_loop_of_ones_own_shares_its_work_where_it_is_asked_to(tmp_path):
    expected = looped(0)
    for found in run(2, looped, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


def loosened(rank):
    """A prediction in one process alone, which makes its plan another, before one of all; draws of each process."""
    with distributed.alone():
        posterior = bkf.fit(cases.network(), BATCHES, bkf.KalmanConfig(), progress=False)
    again = bkf.Posterior(bkf.KalmanFilter(cases.network(), posterior.config), posterior.state)
    if rank == 0:
        again.predict(X[:1].expand(400, -1))
    generator = torch.Generator().manual_seed(rank)
    drawn = again.predict_loader(BATCHES, method="sampled", num_samples=4, generator=generator, keep_samples=True)
    return {"probs": again.predict_loader([(X.repeat(9, 1), Y.repeat(9))]).probs, "samples": drawn.samples}


def test_what_one_process_did_alone_and_its_random_numbers_do_not_count(tmp_path):
    expected = loosened(0)
    for found in run(2, loosened, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


def tagged(rank):
    """Labels of tokens: predictions of the labelled ones; batches in which a part has no token to learn."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForTokenClassification(BertConfig(vocab_size=20, num_labels=3, **small)).double().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    ids = torch.randint(1, 20, (12, 6), generator=torch.Generator().manual_seed(1))
    labels = ids % 3
    labels[::2, 4:] = -100
    labels[:2] = -100  # all that the first process has of the first batch
    batches = [{"input_ids": i, "labels": y} for i, y in zip(ids.split(4), labels.split(4), strict=True)]
    posterior = bkf.fit(model, batches, progress=False)
    return {"mean": posterior.mean_vector, "probs": posterior.predict_loader(batches).probs}


def test_labels_of_tokens_are_predicted_and_parts_without_them_learned(tmp_path):
    expected = tagged(0)
    for found in run(2, tagged, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)


class Counted(nn.Module):
    """A network that counts the examples it is run on."""

    def __init__(self):
        super().__init__()
        self.inner, self.examples = cases.network(), 0

    def forward(self, x):
        self.examples += len(x)
        return self.inner(x)


def counted(rank):
    """How many examples a process runs the model on: in a fit, in predictions, and in a fit alone."""
    model = Counted()
    posterior = bkf.fit(model, BATCHES, bkf.KalmanConfig(mean_passes=1), progress=False)
    fit = model.examples
    posterior.predict_loader(BATCHES)
    both = model.examples
    with distributed.alone():
        alone = bkf.fit(model, BATCHES[rank:], bkf.KalmanConfig(mean_passes=1), progress=False)
        posterior.predict_loader(BATCHES[rank:])
    counts = {"fit": fit, "predict": both - fit, "alone": model.examples - both}
    return {name: torch.tensor(number) for name, number in counts.items()} | {"of": torch.tensor(alone.state.examples)}


def test_each_process_does_its_part_and_alone_all_of_it(tmp_path):
    (whole,) = run(1, counted, tmp_path)
    first, second = run(2, counted, tmp_path)
    for name in ("fit", "predict"):
        done = int(first[name]), int(second[name])
        assert max(done) < 0.7 * int(whole[name])
        assert sum(done) < 1.4 * int(whole[name])  # the check of the model's first batch is done by all
    assert int(first["alone"]) == int(whole["alone"])
    assert (int(first["of"]), int(second["of"])) == (N, N - 11)


class Numbers(IterableDataset):
    """A stream of examples."""

    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def prepared(rank, kind):
    """A fit and predictions with a loader that Accelerate has prepared; on one process it divides nothing."""
    size = torch.distributed.get_world_size()
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.manual_seed(7 + rank)  # the order is that of the first process
    settings = DataLoaderConfiguration(dispatch_batches=kind.startswith("dispatched"), use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=settings)
    data = Numbers() if kind.endswith("stream") else TensorDataset(X, Y)
    whole = DataLoader(data, batch_size=7, shuffle=kind == "shuffled")
    ready = accelerator.prepare(whole)
    assert sum(len(y) for _, y in ready) < N or size == 1  # a process has its part
    posterior = bkf.fit(cases.network(), ready, bkf.KalmanConfig(mean_passes=1), progress=False)
    predicted = posterior.predict_loader(accelerator.prepare(DataLoader(TensorDataset(X, Y), batch_size=7)))
    examples = torch.tensor(posterior.state.examples)
    return {"mean": posterior.mean_vector, "probs": predicted.probs, "examples": examples}


@pytest.mark.parametrize("kind", ["shuffled", "dispatched", "stream", "dispatched stream"])
def test_a_loader_that_accelerate_has_prepared_is_read_as_a_whole(kind, tmp_path):
    (expected,) = run(1, prepared, tmp_path, kind)
    assert int(expected["examples"]) == N
    for found in run(2, prepared, tmp_path, kind):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


class Moving(nn.Module):
    """A network that moves rows of its hidden layer where an example says so, so that hooks give wrong rows there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()

    def forward(self, x):
        order = torch.arange(len(x))
        if len(x) > 1 and bool((x[:, 0] > 50).any()):
            order = order.flip(0)
        hidden = torch.tanh(self.first(x[order]))  # the hook of `first` sees other rows than the examples
        return self.last(hidden[order.argsort()])


def moving(rank):
    """Two batches: in the first only the last process has an example that makes the network move rows."""
    x = X[:12].clone()
    x[-1, 0] = 60.0
    kf = bkf.KalmanFilter(Moving(), bkf.KalmanConfig(covariance="diagonal"))
    with launched.working_together("moving"):
        state = kf.init(X[12:24])
        for inputs, targets in ((X[12:24], Y[12:24]), (x, Y[:12]), (X[24:31], Y[24:31])):
            state, _ = kf.update(state, inputs, targets)
    return {"mean": state.belief.mean, "by": torch.tensor([ord(kind[0]) for kind in kf.adapter.linearized_by.values()])}


def test_hooks_that_fail_in_one_process_are_refused_in_all(tmp_path):
    (expected,) = run(1, moving, tmp_path)
    first, second = run(2, moving, tmp_path)
    assert torch.equal(first["by"], second["by"])
    assert ord("g") in first["by"]
    for found in (first, second):
        torch.testing.assert_close(found["mean"], expected["mean"], rtol=1e-6, atol=1e-8)


class Breaking:
    """A loader that raises an error before its third batch."""

    def __iter__(self):
        yield from BATCHES[:2]
        raise OSError("no disk")


def failing(rank, what):
    """The error of a process: its kind and its words."""
    model, loader, config = cases.network(), BATCHES, bkf.KalmanConfig()
    if what == "model" and rank:
        with torch.no_grad():
            model[0].weight[0, 0] += 1e-6
    if what == "settings" and rank:
        config = bkf.KalmanConfig(rank=7)
    if what == "examples":
        loader = BATCHES[rank::2]
    if what == "length" and rank:
        loader = BATCHES[:-1]
    if what == "loader" and rank:
        loader = Breaking()
    if what == "order" and rank:
        loader = [(x.flip(0), y.flip(0)) for x, y in BATCHES]
    if what == "buffer":
        model = nn.Sequential(nn.BatchNorm1d(5), model).double()
        model[0].running_mean += rank
    if what == "batch" and rank:
        loader = [*BATCHES[:-1], (X[:2] * torch.nan, Y[:2])]
    try:
        if what == "call" and rank:
            cases.network()
            bkf.fit_mixture(model, BATCHES, progress=False)
        else:
            bkf.fit(model, loader, config, progress=False)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("model", ["RuntimeError: `model` (seed torch before it is made, or load it) must be the same"] * 2),
        ("settings", ["RuntimeError: the arguments of `fit` must be the same in every process"] * 2),
        ("examples", ["RuntimeError: the batches of `loader` (the whole loader belongs in every process"] * 2),
        ("length", ["RuntimeError: the batches of `loader`"] * 2),
        ("order", ["RuntimeError: the batches of `loader`"] * 2),
        ("buffer", ["RuntimeError: `model` (seed torch before it is made, or load it) must be the same"] * 2),
        ("loader", ["OtherProcessError: process 1 could not continue", "OSError: no disk"]),
        ("batch", ["RuntimeError: the batches of `loader`"] * 2),
        ("call", ["RuntimeError: the function that shares its work between processes must be the same"] * 2),
    ],
)
def test_what_differs_between_processes_is_told_by_all(what, words, tmp_path):
    for found, start in zip(run(2, failing, tmp_path, what), words, strict=True):
        assert found["error"].startswith(start), found["error"]


def checkpointed(rank, folder, stop):
    """A pass with checkpoints that is stopped after some batches, or goes to its end."""
    batches = [*BATCHES[:stop], "no batch"] if stop else BATCHES
    try:
        posterior = bkf.fit(cases.network(), batches, bkf.KalmanConfig(), checkpoint=folder, every=2, progress=False)
    except ValueError:
        return {}
    return {"mean": posterior.mean_vector, "covariance": posterior.covariance_matrix()}


def test_a_pass_is_resumed_on_another_number_of_processes(tmp_path):
    folder = str(tmp_path / "checkpoint")
    run(2, checkpointed, tmp_path, folder, 5)
    assert bkf.Posterior.from_pretrained(folder, cases.network()).state.step == 5
    run(3, checkpointed, tmp_path, folder, 7)
    whole = checkpointed(0, str(tmp_path / "other"), None)
    for name, value in checkpointed(0, folder, None).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-8, atol=1e-10)


class Ending:
    """A loader in whose sixth batch its process is gone, without a word."""

    def __iter__(self):
        yield from BATCHES[:5]
        os._exit(0)


def separate(rank, folder):
    """Checkpoints in a folder that only one process can see."""
    stopped = [*BATCHES[:4], "no batch"]
    try:
        for batches in (stopped, BATCHES):
            with suppress(ValueError):
                bkf.fit(
                    cases.network(), batches, bkf.KalmanConfig(), checkpoint=f"{folder}/{rank}", every=2, progress=False
                )
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": "none"}


def test_a_checkpoint_that_not_all_processes_see_is_told(tmp_path):
    for found in run(2, separate, tmp_path, str(tmp_path)):
        assert found["error"].startswith("the posterior in `checkpoint` must be the same in every process")


def unwritten(rank, folder):
    """The error of a process when the first one cannot write a checkpoint."""

    def no_space(*_):
        raise OSError("no space left")

    if rank == 0:
        bkf.Posterior.save_pretrained = no_space
    try:
        bkf.fit(cases.network(), BATCHES, bkf.KalmanConfig(), checkpoint=folder, every=2, progress=False)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


def test_a_checkpoint_that_cannot_be_written_ends_all(tmp_path):
    first, second = run(2, unwritten, tmp_path, str(tmp_path / "checkpoint"))
    assert first["error"] == "OSError: no space left"
    assert second["error"].startswith("OtherProcessError: process 0 could not continue")


def survivor(rank, folder):
    """Writes the error of a process after another one has ended in the middle of a pass."""
    loader = Ending() if rank else BATCHES
    try:
        bkf.fit(cases.network(), loader, bkf.KalmanConfig(), checkpoint=folder, every=2, progress=False)
    except distributed.OtherProcessError as error:
        Path(folder).with_suffix(".txt").write_text(str(error), encoding="utf-8")
    os._exit(0)


def test_a_process_that_is_gone_leaves_a_whole_checkpoint_and_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError):  # both processes end before they return anything
        run(2, survivor, tmp_path, str(tmp_path / "checkpoint"))
    assert bkf.Posterior.from_pretrained(tmp_path / "checkpoint", cases.network()).state.step == 5
    sentence = (tmp_path / "checkpoint.txt").read_text(encoding="utf-8")
    assert sentence.startswith("another process has ended, does not answer, or is not in step (")
    assert "\n" not in sentence


def slow_network(seconds):
    """The network with a wait in every forward pass."""
    model = cases.network()
    model.register_forward_pre_hook(lambda module, args: time.sleep(seconds))
    return model


def waited(rank, seconds):
    """The warnings of a fit whose second process takes so much longer for each forward pass."""
    launched.SLOW_SECONDS = 0.5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bkf.fit(slow_network(seconds if rank else 0.0), BATCHES, bkf.KalmanConfig(), progress=False)
    return {"said": [str(w.message) for w in caught if "worked" in str(w.message)]}


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_slow_process_is_told(seconds, tmp_path):
    first, second = run(2, waited, tmp_path, seconds)
    assert not second["said"]
    if not seconds:
        assert not first["said"]
    else:
        (sentence,) = first["said"]
        assert sentence.startswith("process 1 worked ")
        assert "on its share of `fit`" in sentence
