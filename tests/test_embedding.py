import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import dtypes, every_backend, seeds

pytestmark = every_backend


@given(tokens=st.integers(0, 9), vocab=st.integers(1, 9), d=st.integers(1, 9), dtype=dtypes, seed=seeds)
def test_a_token_becomes_its_row_of_the_table(ops, tokens, vocab, d, dtype, seed):
    rng = np.random.default_rng(seed)
    ids, w = rng.integers(0, vocab, tokens), rng.standard_normal((vocab, d)).astype(dtype)
    x = ops.to_numpy(ops.embedding(ops.array(ids), ops.array(w)))
    expected = torch.nn.functional.embedding(torch.tensor(ids), torch.tensor(w)).numpy()
    assert x.dtype == dtype
    np.testing.assert_array_equal(x, expected)


def test_what_is_written_into_the_output_leaves_the_table_alone(ops):
    w = ops.array(np.ones((3, 2), np.float32))
    x = ops.embedding(ops.array(np.arange(3)), w)
    x += 1
    assert (ops.to_numpy(w) == 1).all()
