import os
import signal

import pytest
import safetensors.torch
import torch
from torchvision import models

from mas_embed import UserError
from mas_embed.models.trunks import load_trunk


@pytest.fixture(scope="module")
def state():
    return models.get_model("squeezenet1_1").state_dict()  # small


def changed(state, value):
    return {**state, "features.0.bias": value}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.full((64,), float("nan")), "has values that are not finite"),
        (torch.full((64,), float("inf")), "has values that are not finite"),
        (torch.full((64,), 1e300, dtype=torch.float64), "has values that are not finite"),
        (torch.zeros(64, dtype=torch.long), "is int64, but it must be dense and float32"),
        (torch.zeros(64, dtype=torch.complex64), "is complex64, but it must be dense and float32"),
        (torch.zeros(64).to_sparse(), "is sparse, but it must be dense and float32"),
        (torch.zeros(64, device="meta"), r"has no values \(it is on the device 'meta'\)"),
    ],
    ids=["nan", "inf", "too large", "integers", "complex", "sparse", "meta"],
)
def test_a_tensor_that_cannot_be_used_is_named(tmp_path, state, value, problem):
    torch.save(changed(state, value), tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=rf"weights .*weights.pth cannot be used: the tensor features.0.bias {problem}$"
    ):
        load_trunk("squeezenet1_1", str(tmp_path / "weights.pth"))


def test_half_precision_is_accepted(tmp_path, state):
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "weights.pth")
    trunk = load_trunk("squeezenet1_1", str(tmp_path / "weights.pth"))
    assert trunk.state_dict()["features.0.bias"].dtype == torch.float32


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torn_and_damaged_files(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    save = torch.save if suffix == "pth" else safetensors.torch.save_file
    save({"weight": torch.zeros(100), "bias": torch.zeros(3)}, path)
    content = path.read_bytes()
    header = b"\xff" * 8 + content[8:]
    for damaged in (
        content[: len(content) // 2],
        content[:-1],
        content[:9],
        b"",
        b"text",
        header,
        b"\x80\x02}",
        b"\0" * 99,
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^(cannot read weights from )?{path}(:| has| holds) ") as caught:
            load_trunk("squeezenet1_1", str(path))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_pipe_and_a_folder_are_no_weights(tmp_path):
    signal.alarm(20)
    for suffix in ("pth", "safetensors"):
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        with pytest.raises(
            UserError, match="cannot read weights from .*pipe.* it is a pipe, a socket or a device, not a file"
        ):
            load_trunk("squeezenet1_1", str(tmp_path / f"pipe.{suffix}"))
    signal.alarm(0)
    with pytest.raises(UserError, match="cannot read weights from .*: it is a folder, not a file"):
        load_trunk("squeezenet1_1", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot read weights from a\\x00b.pth: embedded null byte"):
        load_trunk("squeezenet1_1", "a\0b.pth")


def test_names_of_tensors_that_are_no_text(tmp_path):
    torch.save({1: torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights.pth holds no state dict of tensors"):
        load_trunk("squeezenet1_1", str(tmp_path / "weights.pth"))
