"""Sparse TensorData: compressed sparse rows, as the client library and torch have them."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker.types import TensorData as TheirTensorData

from minitinker.tensors import TensorData


def matrices(dtype):
    shape = st.tuples(st.integers(0, 6), st.integers(1, 7))
    return hnp.arrays(dtype, shape, elements=st.integers(-2, 2), fill=st.just(0))


sparse_ones = matrices(np.int64) | matrices(np.float32)
pads = st.integers(-2, 2)


def form(tensor):
    return (
        tensor.dtype,
        tensor.shape,
        tensor.data,
        tensor.sparse_crow_indices,
        tensor.sparse_col_indices,
    )


@given(array=sparse_ones, pad=pads)
def test_a_matrix_comes_back_as_it_went_in_with_the_pad_it_went_in_with(array, pad):
    tensor = TensorData.from_torch_sparse(torch.from_numpy(array), pad_value=pad)
    assert tensor.shape == list(array.shape)
    assert tensor.to_numpy(pad).tobytes() == array.tobytes()
    assert tensor.to_torch(pad).numpy().tobytes() == array.tobytes()
    assert tensor.tolist(pad) == array.tolist()
    assert TensorData(*(form(tensor)[i] for i in (2, 0, 1, 3, 4))) == tensor


@given(array=sparse_ones.filter(lambda array: array.size), pad=pads)
def test_what_is_listed_is_what_the_client_library_lists(array, pad):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse rows unfinished
        theirs = TheirTensorData.from_torch_sparse(torch.from_numpy(array), pad_value=pad)
    ours = TensorData.from_torch_sparse(torch.from_numpy(array), pad_value=pad)
    assert form(ours) == form(theirs)


@given(array=sparse_ones, pad=pads)
def test_copies_are_equal_and_read_only(array, pad):
    tensor = TensorData.from_torch_sparse(torch.from_numpy(array), pad_value=pad)
    for other in (pickle.loads(pickle.dumps(tensor)), copy.deepcopy(tensor)):
        assert other == tensor
        assert not other._array.flags.writeable


@given(array=sparse_ones, pad=pads)
def test_another_matrix_takes_over_the_layout(array, pad):
    layout = TensorData.from_torch_sparse(torch.from_numpy(array), pad_value=pad)
    other = np.arange(array.size, dtype=np.float32).reshape(array.shape) + 1
    taken = TensorData.from_numpy(other).with_layout_of(layout)
    assert form(taken)[3:] == form(layout)[3:]
    if layout.sparse_crow_indices is None:
        np.testing.assert_array_equal(taken.to_numpy(), other)
    else:
        np.testing.assert_array_equal(taken.to_numpy(), np.where(array != pad, other, 0))


def test_what_is_not_listed_is_the_pad_that_is_asked_for():
    tensor = TensorData([7, 8], "int64", [2, 3], [0, 1, 2], [2, 0])
    assert tensor.data == [7, 8]
    assert tensor.tolist() == [[0, 0, 7], [8, 0, 0]]
    assert tensor.tolist(-1) == [[-1, -1, 7], [8, -1, -1]]
    assert repr(tensor) == "TensorData([7, 8], dtype='int64', shape=[2, 3], sparse)"


def test_sparse_and_dense_differ_as_do_layouts():
    dense, sparse = TensorData([[0, 7]], "int64"), TensorData([7], "int64", [1, 2], [0, 1], [1])
    assert dense != sparse
    assert sparse != TensorData([7], "int64", [1, 2], [0, 1], [0])
    assert sparse == TensorData([7], "int64", [1, 2], [0, 1], [1])


def test_what_takes_less_room_dense_stays_dense():
    assert TensorData.from_torch_sparse(torch.ones(4, 4)).sparse_crow_indices is None
    assert TensorData.from_torch_sparse(torch.zeros(9)).sparse_crow_indices is None
    assert TensorData.from_torch_sparse(torch.zeros(9, 9)).data == []


@pytest.mark.parametrize(
    ("shape", "crow", "col", "message"),
    [
        ([2, 3], [0, 1, 2], None, "together or not at all"),
        ([2, 3], None, [0, 1], "together or not at all"),
        (None, [0, 1, 2], [0, 1], "shape is None; sparse data needs the shape of the whole matrix"),
        ([6], [0, 1, 2], [0, 1], r"shape is \[6\]"),
        ([2, -3], [0, 1, 2], [0, 1], r"shape is \[2, -3\]; .*, \[rows, columns\], each at least 0"),
        ([2, 3], [0, 2], [0, 1], "sparse_crow_indices must be 3 numbers"),
        ([2, 3], [1, 1, 2], [0, 1], "from 0 to the 2 values"),
        ([2, 3], [0, 1, 3], [0, 1], "from 0 to the 2 values"),
        ([3, 3], [0, 2, 1, 2], [0, 1], "never fall"),
        ([2, 3], [0, 1, 2], [0], "sparse_col_indices must be 2 columns"),
        ([2, 3], [0, 1, 2], [0, 3], "each from 0 to 2"),
        ([2, 3], [0, 1, 2], [0, -1], "each from 0 to 2"),
        ([2, 3], [0, 2, 2], [1, 0], "rise within each row"),
        ([2, 3], [0, 2, 2], [1, 1], "rise within each row"),
    ],
)
def test_indices_that_do_not_fit_are_refused(shape, crow, col, message):
    with pytest.raises(ValueError, match=message):
        TensorData([7, 8], "int64", shape, crow, col)


@pytest.mark.parametrize("pad", [True, 0.0, None, "0"])
def test_a_pad_that_is_no_whole_number_is_refused(pad):
    for call in (TensorData([1], "int64").to_numpy, TensorData([1], "int64").tolist):
        with pytest.raises(TypeError, match="pad_value is"):
            call(pad)


def test_nothing_is_a_tensor_of_nothing():
    assert TensorData(dtype="int64") == TensorData([], "int64")
    with pytest.raises(TypeError, match="needs a dtype"):
        TensorData([1])
