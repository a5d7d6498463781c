import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_checks import dtypes, every_backend, seeds

pytestmark = every_backend

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(shape=shapes, dtype=st.sampled_from([np.float32, np.float64, np.int64]), seed=seeds)
def test_an_array_comes_back_as_it_went_in(ops, shape, dtype, seed):
    x = np.asarray(100 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)
    back = ops.to_numpy(ops.array(x))
    assert isinstance(back, np.ndarray)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_take_the_dtype_that_is_asked_for(ops, dtype):
    back = ops.to_numpy(ops.array([[1, 2], [3, 4]], dtype))
    assert back.dtype == dtype
    assert back.tolist() == [[1, 2], [3, 4]]
    assert ops.to_numpy(ops.array(np.arange(3), dtype)).dtype == dtype


@given(shape=shapes, dtype=dtypes)
def test_zeros_are_zeros_of_the_shape_and_dtype(ops, shape, dtype):
    x = ops.to_numpy(ops.zeros(shape, dtype))
    assert (x.shape, x.dtype) == (shape, dtype)
    assert not x.any()
    assert ops.to_numpy(ops.zeros(shape)).dtype == np.float32


def test_zeros_are_new_each_time(ops):
    x = ops.zeros((3,))
    x += 1
    assert ops.to_numpy(x).tolist() == [1, 1, 1]
    assert ops.to_numpy(ops.zeros((3,))).tolist() == [0, 0, 0]


def test_plus_reshape_and_slices_are_those_of_numpy(ops):  # all that the transformer does between two ops
    x = np.arange(12.0, dtype=np.float32)
    y = ops.array(x).reshape(3, 4)
    np.testing.assert_array_equal(ops.to_numpy((y + y)[1:, :2]), (x.reshape(3, 4) * 2)[1:, :2])


def test_what_is_written_into_a_slice_stands_in_the_whole(ops):  # A and B are views into one flat buffer
    flat = ops.zeros((6,))
    view = flat[2:6].reshape(2, 2)
    view += 1
    assert ops.to_numpy(flat).tolist() == [0, 0, 1, 1, 1, 1]
