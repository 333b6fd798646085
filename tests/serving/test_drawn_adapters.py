"""Drawn adapters on a server: one of our own that speaks OpenAI's protocol over real PEFT adapters."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import language_models as lm
import pytest
import torch
from peft import PeftModel

from bayes_kf.serving import DrawnAdapters
from bayes_kf.serving.drawn_adapters import average_tokens

DRAWS = 3


class Server(ThreadingHTTPServer):
    """Completions by a PEFT model of several adapters, one request at a time."""

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.lock, self.asked = model, threading.Lock(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @torch.no_grad()
    def complete(self, asked):
        """The protocol's answer: the next token, and with ``echo`` the tokens of the prompt."""
        with self.lock:
            self.model.set_adapter(asked["model"])
            ids = lm.ids(asked["prompt"])
            log_probs = self.model(input_ids=ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
        token = int(log_probs[-1].argmax())
        echoed = ids.tolist() if asked.get("echo") else []
        own = [None, *log_probs[:-1].gather(-1, ids[1:, None]).squeeze(-1).tolist()] if echoed else []
        top = log_probs[-1].topk(asked["logprobs"])
        start = 0 if echoed else len(ids)
        return {
            "tokens": [lm.LETTERS[number] for number in [*echoed, token]],
            "token_logprobs": [*own, float(log_probs[-1, token])],
            "text_offset": [start + number for number in range(len(echoed) + 1)],
            "top_logprobs": [
                *[None] * len(echoed),
                {lm.LETTERS[int(n)]: float(v) for n, v in zip(top.indices, top.values, strict=True)},
            ],
        }


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), asked))
        known = asked["model"] in self.server.model.peft_config
        answer = {"choices": [{"logprobs": self.server.complete(asked)}]} if known else {"error": "no such model"}
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A posterior, the folder of its draws, and a server that holds them."""
    folder = tmp_path_factory.mktemp("draws")
    posterior = lm.posterior_around(lm.lora(), 0.02)
    posterior.export_adapters(folder, DRAWS, width=0.5)
    model = PeftModel.from_pretrained(lm.base(), folder / "draw_0", adapter_name="draw_0")
    for number in range(1, DRAWS):
        model.load_adapter(folder / f"draw_{number}", adapter_name=f"draw_{number}")
    server = Server(model.eval())
    yield posterior, folder, server
    server.shutdown()
    server.server_close()


def drawn_logits(posterior, ids):
    """Logits under the exported draws, by the posterior's own model, (S, T, V)."""
    draws = posterior.sample(DRAWS, width=0.5)
    with torch.no_grad():
        spoken = []
        for draw in draws:
            with posterior.adapter.substituted(posterior.adapter.tensors(draw)):
                spoken.append(posterior.adapter.model(input_ids=ids.unsqueeze(0)).logits[0].double())
    return torch.stack(spoken)


def test_the_folder_lists_its_draws(served):
    _, folder, _ = served
    listed = json.loads((folder / "draws.json").read_text())
    assert listed["adapters"] == ["draw_0", "draw_1", "draw_2"]
    assert listed["width"] == 0.5
    assert listed["softmax_temperature"] == 1.0


def test_peft_mixes_draws_in_one_batch(served):
    """Each row by another draw, as ``adapter_names`` asks, against one pass of each."""
    posterior, _, server = served
    ids = lm.ids("The following are")
    with torch.no_grad():
        mixed = server.model(input_ids=ids.repeat(DRAWS, 1), adapter_names=[f"draw_{n}" for n in range(DRAWS)]).logits
    torch.testing.assert_close(mixed.double(), drawn_logits(posterior, ids), rtol=1e-4, atol=1e-4)


def test_the_next_token_is_averaged_over_the_draws(served):
    posterior, folder, server = served
    client = DrawnAdapters(server.url, folder, api_key="secret")
    actual = client.next_token("The following ar", top=len(lm.LETTERS))
    probs = drawn_logits(posterior, lm.ids("The following ar"))[:, -1].softmax(-1)
    mean = probs.mean(0)
    torch.testing.assert_close(actual.probs, mean.sort(descending=True).values, rtol=1e-4, atol=1e-7)
    assert actual.tokens[0] == lm.LETTERS[int(mean.argmax())]
    entropy = float(torch.special.entr(mean).sum())
    agreed = float(torch.special.entr(probs).sum(-1).mean())
    assert actual.entropy == pytest.approx(entropy, rel=1e-4)
    assert actual.epistemic == pytest.approx(entropy - agreed, rel=1e-2)
    assert {header for _, header, _ in server.asked[-DRAWS:]} == {"Bearer secret"}
    assert {asked["model"] for _, _, asked in server.asked[-DRAWS:]} == {"draw_0", "draw_1", "draw_2"}
    few = client.next_token("The following ar", top=2)
    assert few.entropy < actual.entropy
    assert float(few.probs.sum()) < 1.0


def test_tokens_are_written_by_all_draws_together(served):
    posterior, folder, server = served
    client = DrawnAdapters(server.url, folder)
    steps = client.write("The following ", 5)
    text = lm.ids("The following ")
    for step in steps:
        mean = drawn_logits(posterior, text)[:, -1].softmax(-1).mean(0)
        assert step.tokens[0] == lm.LETTERS[int(mean.argmax())]
        text = torch.cat([text, mean.argmax().view(1)])
    assert len(client.write("The following ", 5, stop=[steps[1].tokens[0]])) <= 2


def test_answers_are_those_of_the_draws(served):
    posterior, folder, server = served
    client = DrawnAdapters(server.url, folder)
    actual = client.answer("The following ar", ["e", "gh"])
    logits = []
    for option in ("e", "gh"):
        ids = lm.ids(f"The following ar{option}")
        log_probs = drawn_logits(posterior, ids).log_softmax(-1)[:, :-1]
        logits.append(log_probs.gather(-1, ids[1:].expand(DRAWS, -1)[..., None]).squeeze(-1)[:, 15:].sum(-1))
    probs = torch.stack(logits, -1).softmax(-1)
    torch.testing.assert_close(actual.probs[0], probs.mean(0), rtol=1e-4, atol=1e-6)
    assert actual.texts == ["e"]
    assert float(actual.epistemic) == pytest.approx(
        float(torch.special.entr(probs.mean(0)).sum() - torch.special.entr(probs).sum(-1).mean()), rel=1e-2
    )
    assert client.answer("The following ar", ["e", "gh"], per_token=True).probs[0, 1] > actual.probs[0, 1]


def test_draws_that_list_other_tokens_are_averaged():
    actual = average_tokens([{"a": -0.1, "b": -3.0}, {"a": -0.2, "c": -2.5}])
    expected = torch.tensor([[-0.1, -3.0, -torch.inf], [-0.2, -torch.inf, -2.5]]).double().exp()
    assert actual.tokens == ["a", "c", "b"]
    torch.testing.assert_close(actual.probs, expected.mean(0)[[0, 2, 1]])


def test_bad_servers_and_folders_are_named(served, tmp_path):
    _, folder, server = served
    with pytest.raises(ValueError, match=r"`draws` must be a folder with draws\.json, got "):
        DrawnAdapters(server.url, tmp_path)
    with pytest.raises(ValueError, match="`draws` must name at least one adapter, got none"):
        DrawnAdapters(server.url, [])
    with pytest.raises(ValueError, match="`url` must be a server with other, got 404"):
        DrawnAdapters(server.url, ["other"]).next_token("The ")
    with pytest.raises(ValueError, match="`url` must be a server of OpenAI's protocol, got http"):
        DrawnAdapters("http://127.0.0.1:9/v1", folder).next_token("The ")
    with pytest.raises(ValueError, match="`options` must be at least two texts"):
        DrawnAdapters(server.url, folder).answer("The ", ["a"])
