import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minitinker.tensors import TensorData, is_torch_tensor

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
int64s = hnp.arrays(np.int64, shapes)
float32s = hnp.arrays(np.float32, shapes)  # with NaN, infinities and -0.0
arrays = int64s | float32s


@given(arrays)
def test_numpy_comes_back_as_it_went_in(array):
    back = TensorData.from_numpy(array).to_numpy()
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@given(arrays)
def test_torch_comes_back_as_it_went_in(array):
    tensor = torch.from_numpy(array.copy())
    back = TensorData.from_torch(tensor).to_torch()
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert back.numpy().tobytes() == array.tobytes()


@given(arrays)
def test_flat_data_with_dtype_and_shape_says_everything(array):
    tensor = TensorData.from_numpy(array)
    assert tensor.dtype == str(array.dtype)
    assert tensor.shape == list(array.shape)
    assert len(tensor.data) == array.size
    assert TensorData(tensor.data, tensor.dtype, tensor.shape) == tensor
    assert TensorData(data=tensor.data, dtype=tensor.dtype, shape=tensor.shape) == tensor
    assert np.array_equal(np.array(tensor.tolist(), array.dtype).reshape(array.shape), array, equal_nan=True)


@given(arrays)
def test_copies_of_every_kind_are_equal_and_read_only(array):
    tensor = TensorData.from_numpy(array)
    for other in (TensorData.from_numpy(array), pickle.loads(pickle.dumps(tensor)), copy.deepcopy(tensor)):
        assert other == tensor
        assert not other._array.flags.writeable


@given(hnp.arrays(st.sampled_from(["i1", "i2", "i4", ">i4", "u1", "u2", "u4"]), shapes))
def test_integers_of_any_width_become_int64(array):
    tensor = TensorData.from_numpy(array)
    assert tensor.dtype == "int64"
    assert np.array_equal(tensor.to_numpy(), array)


@given(hnp.arrays(st.sampled_from(["f2", "f8", ">f4"]), shapes, elements=st.floats(-100, 100, width=16)))
def test_floats_of_any_width_become_float32(array):
    tensor = TensorData.from_numpy(array)
    assert tensor.dtype == "float32"
    assert np.array_equal(tensor.to_numpy(), array)


def test_float64_is_rounded_to_float32():
    assert TensorData.from_numpy(np.array([0.1])).data == [float(np.float32(0.1))]
    assert TensorData.from_torch(torch.tensor([0.1], dtype=torch.float64)).data == [float(np.float32(0.1))]


@given(st.lists(st.floats(width=16, allow_nan=False), max_size=5))
def test_bfloat16_and_float16_tensors_widen(numbers):
    for dtype in (torch.bfloat16, torch.float16):
        tensor = torch.tensor(numbers, dtype=dtype)
        assert TensorData.from_torch(tensor) == TensorData.from_torch(tensor.float())


def test_torch_tensors_with_gradients_or_strides_are_taken():
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_()
    assert TensorData.from_torch(tensor).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert TensorData.from_torch(tensor.T).data == [0, 3, 1, 4, 2, 5]
    assert TensorData.from_numpy(np.arange(6).reshape(2, 3).T).data == [0, 3, 1, 4, 2, 5]


def test_editing_the_source_or_a_copy_changes_nothing():
    array, tensor = np.arange(3.0, dtype=np.float32), torch.arange(3.0)
    made = [TensorData(array, "float32"), TensorData.from_numpy(array), TensorData.from_torch(tensor)]
    for data in made:
        data.to_numpy()[:] = 9
        data.to_torch()[:] = 9
        data.shape.append(9)
        data.data.append(9)
    array[:] = 9
    tensor[:] = 9
    for data in made:
        assert (data.data, data.shape) == ([0, 1, 2], [3])
        with pytest.raises(AttributeError):
            data.dtype = "int64"


def test_equal_means_same_dtype_shape_and_values():
    tensor = TensorData([1, 2], "int64")
    assert tensor == TensorData([1, 2], "int64", [2])
    assert tensor != TensorData([1, 2], "float32")
    assert tensor != TensorData([1, 2], "int64", [1, 2])
    assert tensor != TensorData([1, 3], "int64")
    assert tensor != [1, 2]
    assert TensorData([np.nan], "float32") == TensorData([np.nan], "float32")


def test_nested_lists_have_their_own_shape():
    tensor = TensorData([[1, 2, 3], [4, 5, 6]], "int64")
    assert (tensor.shape, tensor.data) == ([2, 3], [1, 2, 3, 4, 5, 6])
    assert tensor.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_whole_floats_and_booleans_are_taken_where_the_dtype_is_stated():
    assert TensorData([1.0, -2.0], "int64") == TensorData([1, -2], "int64")
    assert TensorData([True, False], "float32") == TensorData([1, 0], "float32")
    assert TensorData([], "int64") == TensorData(np.empty(0), "int64")
    assert TensorData([-(2**63), 2**63 - 1], "int64").data == [-(2**63), 2**63 - 1]
    assert TensorData([np.inf], "float32").data == [np.inf]


@pytest.mark.parametrize("numbers", [[2**63], [-1, 2**63], [2**64], [-(2**63) - 1], [np.uint64(2**63)]])
def test_integers_outside_of_int64_are_refused(numbers):
    for make in (lambda: TensorData(numbers, "int64"), lambda: TensorData.from_any(numbers)):
        with pytest.raises(ValueError, match="outside of int64"):
            make()


@pytest.mark.parametrize(
    ("data", "dtype", "shape", "message"),
    [
        ([1.5], "int64", None, "not whole"),
        ([np.nan], "int64", None, "not whole"),
        ([np.inf], "int64", None, "outside of int64"),
        ([1e30], "int64", None, "outside of int64"),
        (np.array([2**63], dtype=np.uint64), "int64", None, "outside of int64"),
        ([1e300], "float32", None, "outside of float32"),
        ([[1], [2, 3]], "int64", None, "ragged"),
        ([1], "float64", None, "dtype is 'float64'; it must be one of"),
        ([1, 2, 3], "int64", [2], r"shape is \[2\], but the data has shape \[3\]"),
        ([1, 2, 3, 4], "int64", [-1, 2], r"shape is \[-1, 2\]; a length must be at least 0, for none"),
        ([[1, 2], [3, 4]], "int64", [4], r"the data has shape \[2, 2\]"),
    ],
)
def test_values_that_do_not_fit_are_refused(data, dtype, shape, message):
    with pytest.raises(ValueError, match=message):
        TensorData(data, dtype, shape)


@pytest.mark.parametrize("data", [["a"], [None], [1j], [b"a"], [{}], "12"])
def test_what_is_not_numbers_is_refused(data):
    with pytest.raises(TypeError, match="not numbers"):
        TensorData(data, "float32")


def test_arrays_of_other_dtypes_are_refused():
    for array in (np.array([True]), np.array([1j]), np.array(["a"]), np.array([None])):
        with pytest.raises(TypeError, match=f"dtype {array.dtype}".replace("<", ".")):
            TensorData.from_numpy(array)
    for tensor in (torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(TypeError, match="dtype"):
            TensorData.from_torch(tensor)


def test_each_constructor_wants_its_own_kind_of_array():
    with pytest.raises(TypeError, match="takes a NumPy array, not list"):
        TensorData.from_numpy([1])
    with pytest.raises(TypeError, match="takes a torch tensor, not ndarray"):
        TensorData.from_torch(np.zeros(1))
    for value in (3, "12", None, {1: 2}):
        with pytest.raises(TypeError, match=f"{type(value).__name__} is not a tensor"):
            TensorData.from_any(value)


@pytest.mark.parametrize(
    ("value", "stated", "dtype"),
    [
        (TensorData([1], "int64"), "float32", "int64"),
        (np.array([1]), "float32", "int64"),
        (torch.tensor([1.0]), "int64", "float32"),
        ([1], None, "int64"),
        ([1.0], None, "float32"),
        ([1, 2.5], None, "float32"),
        (range(2), None, "int64"),
        ([1], "float32", "float32"),
        ([True], "float32", "float32"),
        ([], "int64", "int64"),
        ([torch.tensor(0.5), 1], None, "float32"),
    ],
)
def test_a_stated_dtype_is_for_lists_and_arrays_keep_their_own(value, stated, dtype):
    assert TensorData.from_any(value, stated).dtype == dtype


def test_a_long_tensor_is_shown_shortened():
    assert len(repr(TensorData(np.zeros(10_000), "float32"))) < 120
    assert repr(TensorData([1, 2], "int64")) == "TensorData([1, 2], dtype='int64', shape=[2])"


def test_torch_is_recognised_but_never_imported():
    script = """
import sys
import minitinker.types as types
types.Datum(types.ModelInput.from_ints([1]), {"weights": [1.0]})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert is_torch_tensor(torch.zeros(1))
    assert not is_torch_tensor(np.zeros(1))
