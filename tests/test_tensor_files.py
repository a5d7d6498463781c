"""model/tensor_files.py: rounding against torch, and files against the safetensors library.

Damaged files are in test_weights.py and test_checkpoints.py, since what they must say depends on the reader.
"""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from minitinker.model.tensor_files import read_header, read_tensor, to_bfloat16_bits, write_tensors

ALL_FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
FLOAT_BITS = st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("<f", struct.pack("<I", bits))[0])
# Numbers half-way between two of bfloat16, and their neighbours: where rounding is decided.
HALF_WAY = st.tuples(st.integers(0, 2**16 - 1), st.sampled_from([0x7FFF, 0x8000, 0x8001])).map(
    lambda halves: struct.unpack("<f", struct.pack("<I", (halves[0] << 16) | halves[1]))[0]
)


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=0, min_side=0), elements=ALL_FLOATS | FLOAT_BITS | HALF_WAY
    )
)
def test_bfloat16_rounds_as_torch_does(x):
    theirs = torch.from_numpy(x.copy()).to(torch.bfloat16).float().numpy()
    bits = to_bfloat16_bits(x)
    assert bits.dtype == np.uint16
    assert bits.shape == x.shape
    ours = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(ours, theirs)  # a NaN equals a NaN here
    np.testing.assert_array_equal(np.signbit(ours[~np.isnan(x)]), np.signbit(x[~np.isnan(x)]))


@settings(deadline=None)
@given(st.integers(0, 2**16 - 1))
def test_a_bfloat16_number_survives_the_way_there_and_back(bits):
    x = (np.array([bits], np.uint32) << 16).view(np.float32)
    back = to_bfloat16_bits(x)[0]
    assert back == (bits | 0x40 if np.isnan(x[0]) else bits)


def test_every_block_of_a_large_array_is_rounded():
    x = np.random.default_rng(0).standard_normal((3, 50_001), np.float32)
    ours = to_bfloat16_bits(x.T)
    np.testing.assert_array_equal(ours, torch.from_numpy(x.T).bfloat16().view(torch.uint16).numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors_reads_what_was_written_and_so_do_we(dtype, tmp_path):
    random = np.random.default_rng(0)
    tensors = {"b": random.standard_normal((3, 5), np.float32), "a": random.standard_normal(7, np.float32).T}
    path, shapes = tmp_path / "x.safetensors", {name: x.shape for name, x in tensors.items()}
    write_tensors(path, shapes, (tensors[name] for name in shapes), dtype)
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, torch.from_numpy(tensors[name]).to(tensor.dtype))
    stored = read_header(path)
    assert list(stored) == ["b", "a"]
    for name in stored:
        np.testing.assert_array_equal(read_tensor(name, stored[name]), theirs[name].float().numpy())


def test_a_file_with_fewer_tensors_than_its_header_is_not_written_silently(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_tensors(tmp_path / "x", {"a": (1,), "b": (1,)}, [np.ones(1, np.float32)], "float32")
