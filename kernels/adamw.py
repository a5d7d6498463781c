def adamw_(*args):
    raise RuntimeError("not written yet")


def global_norm(*args):
    raise RuntimeError("not written yet")
