import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from mas_embed import UserError
from mas_embed.retrieval import embed

INPUTS = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))


def model(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9)).to(dtype)


def batch_by_batch(network, inputs=INPUTS):
    """The output of the linear layer without dropout, in the batches of `loader`."""
    with torch.no_grad():
        return torch.cat([network[0](inputs[start : start + 4]) for start in range(0, len(inputs), 4)])


def loader(**options):
    return DataLoader(TensorDataset(INPUTS, torch.zeros(11)), batch_size=4, **options)


@pytest.mark.parametrize("batches", [INPUTS.split(4), loader()], ids=["tuple", "loader"])
@pytest.mark.parametrize("num_items", [None, 11])
def test_every_destination_gives_the_same_bits(batches, num_items, tmp_path):
    network = model()
    expected = batch_by_batch(network)
    assert torch.equal(embed(network, batches, num_items=num_items), expected)
    out = torch.full((11, 2), torch.nan)
    assert embed(network, batches, out=out, num_items=num_items) is out
    assert torch.equal(out, expected)
    array = np.zeros((11, 2), dtype=np.float64)
    assert torch.equal(embed(network, batches, out=array, num_items=num_items), expected.double())
    np.testing.assert_array_equal(array, expected.numpy())
    mapped = embed(network, batches, out=tmp_path / "rows.npy", num_items=num_items)
    assert torch.equal(mapped, expected) and mapped.dtype == torch.float32
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), expected.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]
    assert network.training and network[1].training


def test_writing_into_the_mapped_tensor_leaves_the_file_alone(tmp_path):
    mapped = embed(model(), INPUTS.split(4), out=str(tmp_path / "rows.npy"))
    mapped.zero_()
    assert np.load(tmp_path / "rows.npy").any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_on_disk(dtype, tmp_path):
    network = model(dtype)
    expected = batch_by_batch(network, INPUTS.to(dtype))
    mapped = embed(network, INPUTS.to(dtype).split(4), out=tmp_path / "rows.npy")
    assert mapped.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert torch.equal(mapped, expected.to(mapped.dtype))


def test_an_empty_batch_adds_nothing(tmp_path):
    network, batches = model(), [INPUTS[:4], INPUTS[:0], INPUTS[4:]]
    assert torch.equal(embed(network, batches), embed(network, batches, out=tmp_path / "rows.npy"))


def test_many_rows_on_disk(tmp_path):
    inputs = torch.arange(12_345.0).unsqueeze(1)
    mapped = embed(nn.Identity(), inputs.split(1000), out=tmp_path / "rows.npy")
    assert torch.equal(mapped, inputs)


@pytest.mark.parametrize(
    ("batches", "size"),
    [
        (loader(drop_last=True), 8),
        (loader(sampler=SubsetRandomSampler([4, 2], generator=torch.Generator())), 2),
        (loader(sampler=list(range(11)) * 2), 22),
    ],
)
def test_the_number_of_items_follows_the_sampler(batches, size):
    assert embed(model(), batches).shape == (size, 2)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(INPUTS)


def test_a_stream_of_unknown_length():
    network = model()
    assert torch.equal(embed(network, DataLoader(Stream(), batch_size=4)), batch_by_batch(network))


def test_a_failure_leaves_the_old_file_and_the_mode(tmp_path):
    path, network = tmp_path / "rows.npy", model()
    np.save(path, np.ones(3))
    with pytest.raises(UserError, match=r"batch 1: the model refuses inputs of shape \[11, 3\] .*: broken"):
        embed(network, [INPUTS, INPUTS], out=path, embed=Failing())
    np.testing.assert_array_equal(np.load(path), np.ones(3))
    assert len(list(tmp_path.iterdir())) == 1
    assert network.training


class Failing:
    calls = 0

    def __call__(self, network, batch):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("broken")
        return network(batch)


def test_progress_is_shown_and_changes_nothing(capsys):
    network = model()
    assert torch.equal(embed(network, INPUTS.split(4), progress=True), batch_by_batch(network))
    assert capsys.readouterr().out


def changing(network, batch):
    return torch.zeros(len(batch), len(batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 12}, "12 items were expected but 11 were embedded; pass the right number as num_items"),
        ({"num_items": 7}, "7 items were expected but at least 8 were embedded"),
        ({"out": torch.zeros(10, 2)}, "10 items were expected but at least 11 were embedded"),
        ({"out": torch.zeros(11, 3)}, r"out must have shape \[11, 2\], got \[11, 3\]"),
        ({"out": torch.zeros(11)}, r"out must have shape \[11, 2\], got \[11\]"),
        ({"out": torch.zeros(11, 2), "num_items": 12}, r"out must have shape \[12, 2\], got \[11, 2\]"),
        ({"out": "nowhere/rows.npy"}, "the folder nowhere does not exist"),
        ({"num_items": 11.0}, "num_items must be a whole number >= 0 .*, got 11.0"),
        ({"num_items": True}, "num_items must be a whole number >= 0 .*, got True"),
        ({"out": torch.zeros(11, 2, dtype=torch.int64)}, "out must be a path, or a floating-point tensor or array"),
        ({"out": [[0.0, 0.0]] * 11}, "out must be a path, or a floating-point tensor .* got list"),
        ({"out": torch.tensor(0.0)}, r"out must be .*, got torch.float32 of shape \[\]"),
        ({"out": np.zeros((11, 2), dtype=object)}, "out must be an array of floating-point numbers"),
        ({"embed": changing}, r"one size and dtype, got D = 4 in torch.float32 and then D = 3"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        embed(model(), INPUTS.split(4), **options)


def test_a_read_only_file_map_is_refused_rather_than_written_to(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros((11, 2), dtype=np.float32))
    with pytest.raises(UserError, match="out is a read-only array"):
        embed(model(), INPUTS.split(4), out=np.load(tmp_path / "rows.npy", mmap_mode="r"))


@pytest.mark.parametrize("batches", [INPUTS, INPUTS.numpy(), {"x": INPUTS}, "text", 3, None])
def test_batches_that_are_none_are_one_sentence(batches):
    with pytest.raises(UserError, match="batches must be an iterable of batches, got one"):
        embed(model(), batches)


def test_inputs_of_another_width_name_the_batch_and_a_function_is_no_model():
    with pytest.raises(UserError, match=r"batch 1: the model refuses inputs of shape \[4, 7\] \(torch.float32\): mat1"):
        embed(model(), [INPUTS, torch.zeros(4, 7)])
    with pytest.raises(UserError, match=r"must be a torch.nn.Module, got an object of type builtin_function"):
        embed(len, [INPUTS])


def test_a_wrong_count_writes_no_file(tmp_path):
    with pytest.raises(UserError, match="12 items were expected but 11"):
        embed(model(), INPUTS.split(4), out=tmp_path / "rows.npy", num_items=12)
    with pytest.raises(UserError, match="nothing to embed"):
        embed(model(), [], out=tmp_path / "rows.npy")
    assert not list(tmp_path.iterdir())
