"""The value that carries a batch: its size, parts, device and checks."""

import pytest
import torch

from bayes_kf.models.batch import Batch, batch_size, check_inputs

INPUTS = {
    "input_ids": torch.arange(15).view(5, 3),
    "scale": torch.linspace(0.0, 1.0, 5),
    "position_ids": torch.arange(3).view(1, 3),  # one row for all examples
    "output_attentions": False,
}
TARGETS = torch.tensor([0, 1, 0, 1, 1])


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        (torch.zeros(3, 2), 3),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(2, 2), "c": torch.zeros(2)}, 2),
        ({"a": torch.zeros(2, 2), "b": torch.zeros(4, 2)}, 4),
        (INPUTS, 5),
    ],
)
def test_the_size_is_the_most_frequent_first_dimension(inputs, size):
    assert batch_size(inputs) == Batch.of(inputs).size == check_inputs(inputs) == size


@pytest.mark.parametrize("inputs", [torch.tensor(1.0), {"flag": True}, {"number": torch.tensor(2.0)}, {}])
def test_inputs_without_a_batch_dimension_are_refused(inputs):
    with pytest.raises(ValueError, match="`inputs` must hold a tensor with a batch dimension, got none"):
        Batch.of(inputs)


@pytest.mark.parametrize("which", [slice(1, 3), slice(3, 9), torch.tensor([4, 0, 0])])
def test_parts_have_the_examples_of_inputs_and_targets(which):
    part = Batch.of(INPUTS, TARGETS)[which]
    assert part.size == len(part.targets) == len(part.inputs["input_ids"])
    assert torch.equal(part.inputs["input_ids"], INPUTS["input_ids"][which])
    assert torch.equal(part.inputs["scale"], INPUTS["scale"][which])
    assert torch.equal(part.targets, TARGETS[which])
    assert part.inputs["position_ids"] is INPUTS["position_ids"]
    assert part.inputs["output_attentions"] is False


def test_chunks_cover_the_batch_once_and_in_order():
    batch = Batch.of(INPUTS, TARGETS)
    assert [(s.start, s.stop) for s in batch.slices(2)] == [(0, 2), (2, 4), (4, 5)]
    assert [part.size for part in batch.chunks(2)] == [2, 2, 1]
    assert torch.equal(torch.cat([part.inputs["input_ids"] for part in batch.chunks(2)]), INPUTS["input_ids"])
    assert torch.equal(torch.cat([part.targets for part in batch.chunks(9)]), TARGETS)


def test_a_batch_is_moved_with_its_targets_and_is_not_wrapped_again():
    batch = Batch.of(INPUTS, TARGETS)
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.inputs["scale"], moved.targets)} == {"meta"}
    assert moved.device.type == "meta"
    assert batch.device.type == "cpu"
    assert moved.size == batch.size
    assert moved.inputs["output_attentions"] is False
    assert Batch.of(batch) is batch
    assert Batch.of(torch.zeros(2, 1)).to(torch.device("meta")).targets is None


def test_a_labelled_batch_has_targets():
    batch = Batch.labelled(INPUTS, TARGETS, torch.device("cpu"))
    assert torch.equal(batch.required_targets, TARGETS)
    assert torch.equal(batch.with_targets(TARGETS + 1).required_targets, TARGETS + 1)
    assert batch[:] is batch
    assert batch[0:5] is batch
    with pytest.raises(ValueError, match="`targets` must be a tensor, got list"):
        Batch.labelled(INPUTS, [0, 1, 0, 1, 1], torch.device("cpu"))
    with pytest.raises(ValueError, match="`targets` must be given, got None"):
        Batch.of(INPUTS).required_targets  # noqa: B018


def test_checked_batches_are_finite_and_not_empty():
    checked = Batch.checked(INPUTS, TARGETS, torch.device("cpu"))
    assert checked.size == 5
    assert torch.equal(checked.targets, TARGETS)
    assert Batch.checked(INPUTS).targets is None
    bad = torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])
    with pytest.raises(ValueError, match="`x` must be finite, got 2 NaN or infinite values out of 4"):
        Batch.checked({"x": bad})
    with pytest.raises(ValueError, match="`inputs` must hold at least one example, got an empty batch"):
        Batch.checked(torch.zeros(0, 3))
    with pytest.raises(AttributeError):
        checked.size = 4
