"""model/frequencies.py against transformers."""

import numpy as np
from rope_settings import settings_of_models, transformers_rope

from minitinker.model.frequencies import rope_frequencies


@settings_of_models
def test_frequencies_are_those_of_transformers(head_dim, theta, llama3):
    frequencies = rope_frequencies(head_dim, theta, llama3)
    expected = transformers_rope(head_dim, theta, llama3).inv_freq.numpy()
    assert frequencies.dtype == np.float64
    # transformers rounds to float32 in between, relative to each frequency
    np.testing.assert_allclose(frequencies, expected, rtol=1e-5, atol=0)
