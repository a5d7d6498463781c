def attention_backward(*args):
    raise RuntimeError("not written yet")


def attention_forward(*args):
    raise RuntimeError("not written yet")


def attention_plan(*args):
    raise RuntimeError("not written yet")
