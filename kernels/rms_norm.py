def rms_norm_backward(*args):
    raise RuntimeError("not written yet")


def rms_norm_forward(*args):
    raise RuntimeError("not written yet")
