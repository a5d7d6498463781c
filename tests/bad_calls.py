"""Every method of the clients with arguments that are taken, and for each argument what is drawn for it.

Other test files import this one by name: `from bad_calls import CALLS`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from bad_values import Case, Slot, flag, near, notes, nothing, nowhere, odd, one_of, only, these, whole, words
from bad_world import DATA
from hypothesis import strategies as st
from small_clients import PROMPT, model, prompt
from tiny_models import VOCAB

from minitinker import RetryConfig
from minitinker.errors import TinkerError
from minitinker.types import (
    AdamOptimizerConfig,
    AdamParams,
    Datum,
    DimuonOptimizerConfig,
    ModelInput,
    SamplingParams,
    TensorData,
)

CONTEXT = 256
TEN_YEARS = 10 * 366 * 86400
Take = Callable[[Any], bool | None]

# What the arguments take


def text(most: int) -> Take:
    """A prompt of 1 to so many tokens of the vocabulary."""

    def takes(x: Any) -> bool | None:
        if not isinstance(x, ModelInput):
            return False
        try:
            tokens = x.to_ints()
        except TinkerError:
            return False
        return 0 < len(tokens) <= most and all(0 <= token < VOCAB for token in tokens) and None

    return takes


def name(x: Any) -> bool | None:
    good = isinstance(x, str) and x.isprintable() and 0 < len(x.encode()) <= 200
    return None if good and x[0] != "." and not set(x) & set("/\\") else False


def optimizer(x: Any) -> bool:
    return x is None or isinstance(x, AdamOptimizerConfig)


def numbers_of(x: Any, *keys: str) -> bool | None:
    """A config with these keys."""
    if x is None or (isinstance(x, dict) and not x):
        return True
    return None if isinstance(x, dict) and set(x) <= set(keys) else False


def cases(argument: str, takes: Take, own: list[Callable[[], Any]] | None = None, *other_names: str) -> Slot:
    """An argument, to be given anything, and what is near its rule. other_names: what errors call it, too."""
    names = (argument, *other_names)

    def case(make: Callable[[], Any]) -> Case:
        return Case(make, takes(make()), names)

    own = own or []
    return Slot((odd | one_of(own) if own else odd).map(case), list(map(case, own)))


def refused(slot: Slot) -> Slot:
    """The cases alone that no call takes."""
    return Slot(
        slot.drawn.filter(lambda case: case.taken is False),
        [case for case in slot.listed if case.taken is False],
    )


def fields(cls: type, rules: dict[str, tuple[Take, list[Callable[[], Any]]]], **others: Any) -> Slot:
    """A dataclass with one odd field; rules: of each, what is taken, and what is near that. others: right fields."""

    def one(field: str) -> Slot:
        takes, own = rules[field]
        plain = cases(field, takes, own)

        def case(inner: Case) -> Case:
            return Case(lambda: cls(**others | {field: inner.make()}), inner.taken, inner.names)

        return Slot(plain.drawn.map(case), list(map(case, plain.listed)))

    slots = [one(field) for field in rules]
    return Slot(st.one_of([slot.drawn for slot in slots]), [case for slot in slots for case in slot.listed])


def real(least: float, most: float, none: bool = False, open_below: bool = False) -> Take:
    inside = whole(least, most, none)

    def takes(x: Any) -> bool | None:
        if x is None or isinstance(x, bool) or (inside(x) is False and not hasattr(x, "__float__")):
            return x is None and none
        if isinstance(x, str | bytes | np.ndarray | np.generic | complex) or not _is_real(x):
            return None if isinstance(x, np.number) else False
        return None if (least < x if open_below else least <= x) and x <= most else False

    return takes


def _is_real(x: Any) -> bool:
    return isinstance(x, int | float)


def stops(x: Any) -> bool | None:
    if x is None:
        return True
    if isinstance(x, str):
        x = [x]
    if isinstance(x, list) and x and all(isinstance(part, str) for part in x):
        return None if all(part and "\ud800" not in part for part in x) else False
    return None if hasattr(x, "__len__") or hasattr(x, "tolist") else False


SAMPLING = fields(
    SamplingParams,
    {
        "max_tokens": (whole(1, np.inf, none=True), near(1, 256)),
        "seed": (whole(0, 2**64 - 1, none=True), near(0, 2**64)),
        "stop": (
            stops,
            these("", [""], "\ud800", ["a", "\ud800"], [-1], [264], [10**30], ["a"] * 99, [None], [1, "a"]),
        ),
        "temperature": (real(0, 1e308), near(0, 1)),
        "top_k": (whole(-1, np.inf), near(-1, 264)),
        "top_p": (real(0, 1, open_below=True), near(0, 1)),
    },
    max_tokens=2,
)
TINY = float(np.finfo(np.float32).tiny)
HUGE = these(1e38, 3e38, 4e38, 1e300, TINY, 1e-40, 1 - 1e-16, 1e30, 9e14)
ADAM = fields(
    AdamParams,
    {
        "learning_rate": (real(0, 1e15), near(0, 1) + HUGE),
        "beta1": (real(0, 1 - 1e-16), near(0, 1) + HUGE),
        "beta2": (real(0, 1 - 1e-16), near(0, 1) + HUGE),
        "eps": (real(TINY, 1e15), near(0, 1) + HUGE),
        "weight_decay": (real(0, 1e15), near(0, 1) + HUGE),
        "grad_clip_norm": (real(0, 1e308), near(0, 1) + HUGE),
    },
)
TARGETS = cases(
    "target_prompt_logprobs",
    lambda x: (
        x is None
        or (
            isinstance(x, TensorData)
            and x.dtype == "int64"
            and x.shape[:-1] == [2]
            and x.shape[1] < 999
            and None
        )
    ),
    [
        lambda: TensorData([1, 2], "int64", [2, 1]),
        lambda: TensorData([1, 2], "int64"),
        lambda: TensorData([1, 2], "float32", [2, 1]),
        lambda: TensorData([1, 10**18], "int64", [2, 1]),
        lambda: TensorData([-1, -1], "int64", [2, 1]),
        lambda: TensorData([-2, 1], "int64", [2, 1]),
        lambda: TensorData([], "int64", [2, 0]),
        lambda: TensorData([1], "int64", [2, 10**12], [0, 1, 1], [5]),
        lambda: TensorData([1], "int64", [2, 2**62], [0, 0, 1], [2**61]),
        lambda: TensorData([1], "int64", [2, 3], [0, 0, 1], [2]),
    ],
)
TEXTS = [(), (-1,), (264,), (10**30,), (263,), (1,) * 255, (1,) * 256, (1,) * 257, (1,) * 9999]
PROMPTS = these(*(prompt(*tokens) for tokens in TEXTS))
PATHS = [
    *(
        "tinker://",
        "tinker://a/weights/b",
        "tinker://a/weights/../b",
        "tinker:///weights/b",
        "tinker://a/b/c",
    ),
    *("tinker://a/weights/\0", "tinker://\ud800/weights/b", "tinker://a/weights/" + "b" * 300, "~nobody/x"),
    *(
        "tinker://../../etc/weights/b",
        "file://a/weights/b",
        "tinker://a/weights/.b",
        "/dev/null",
        "/proc/self",
    ),
]
UNKNOWN = these(*PATHS)
A_PATH = ("path", "tinker://", "run id", "the name", "adapter")
A_MODEL = ("model", "folder")
TTL = cases("ttl_seconds", whole(1, TEN_YEARS, none=True), near(1, TEN_YEARS))
NOTES = cases("user_metadata", notes)
NAME = cases("name", name, UNKNOWN + these(*["é" * 101, ".a", "a/b", "a\\b", "a\n"]))
OPTIMIZER = cases("optimizer", optimizer, these(DimuonOptimizerConfig()))
TOKEN = cases("weights_access_token", nothing)
LOSS = cases("loss", nowhere, these(*["Cross_Entropy", "custom", "stable_reinforce"]))
CONFIG = cases("config", numbers_of, these(*[{"beta": 1}, [("beta", 1)], {1: 2}, "beta"]))
NO_DATA = cases(
    "data", lambda x: None if isinstance(x, list) and x and all(isinstance(d, Datum) for d in x) else False
)
SCOPE = cases("access_scope", only("owned", "accessible"))
RUN = cases("training_run_id", nowhere, UNKNOWN, "run id", "training run", "tinker://")


def path_cases(argument: str) -> Slot:
    return cases(argument, nowhere, UNKNOWN, "training run", *A_PATH)


def model_cases(argument: str, none: bool = False) -> Slot:
    return cases(argument, lambda x: none and x is None, UNKNOWN, *A_MODEL)


def a_loss(logprobs: Any, advantages: Any) -> Any:
    return -(logprobs * advantages).sum(), {}


RANKS = {"logprobs": 1, "advantages": 1}
LORA = {flag_name: cases(flag_name, flag) for flag_name in ("train_mlp", "train_attn", "train_unembed")}
FROM_STATE = {
    "path": path_cases("path"),
    "base_model": model_cases("base_model", none=True),
    "user_metadata": NOTES,
    "weights_access_token": TOKEN,
}
PAGE = {
    "limit": cases("limit", whole(0, np.inf), near(0)),
    "offset": cases("offset", whole(0, np.inf), near(0)),
}
RETRY = cases("retry_config", lambda x: x is None or isinstance(x, RetryConfig), [RetryConfig])
RECORD = cases(
    "record_stability_info",
    lambda x: not x if isinstance(x, bool) else None if isinstance(x, np.bool_) else False,
)

# Client -> method -> (arguments that are taken, or a function of the world that gives them; cases of each).
CALLS: dict[str, dict[str, tuple[Any, dict[str, Slot]]]] = {
    "sampling": {
        "sample": (
            lambda w: {
                "prompt": PROMPT,
                "num_samples": 2,
                "sampling_params": SamplingParams(max_tokens=2),
                "include_prompt_logprobs": True,
            },
            {
                "prompt": cases("prompt", text(CONTEXT - 1), PROMPTS),
                "num_samples": cases("num_samples", whole(1, 4096), near(1) + these(4097)),
                "sampling_params": cases("sampling_params", lambda x: isinstance(x, SamplingParams))
                | SAMPLING,
                "include_prompt_logprobs": cases("include_prompt_logprobs", flag),
                "topk_prompt_logprobs": cases("topk_prompt_logprobs", whole(0, VOCAB), near(0, VOCAB)),
                "topk_sample_logprobs": cases("topk_sample_logprobs", whole(0, VOCAB), near(0, VOCAB)),
                "target_prompt_logprobs": TARGETS,
                "prompt_alt_tokens_k": cases("prompt_alt_tokens_k", whole(0, 4096), near(0) + these(4097)),
                "prompt_logprobs_last_n": cases("prompt_logprobs_last_n", whole(1, 2, none=True), near(1, 2)),
            },
        ),
        "compute_logprobs": (
            lambda w: {"prompt": PROMPT},
            {
                "prompt": cases("prompt", text(CONTEXT), PROMPTS),
                "prompt_logprobs_last_n": cases("prompt_logprobs_last_n", whole(1, 2, none=True), near(1, 2)),
            },
        ),
        "from_sampler_handle": (
            lambda w: {"handle": w.sampling.get_sampler_handle()},
            {
                "handle": cases("handle", nowhere, these("minitinker-sampler:1:a"), "sampl", "process"),
                "api_key": cases("api_key", words),
            },
        ),
    },
    "training": {
        "forward": (
            lambda w: {"data": DATA, "loss_fn": "cross_entropy"},
            {"data": NO_DATA, "loss_fn": LOSS, "loss_fn_config": CONFIG},
        ),
        "forward_backward": (
            lambda w: {"data": DATA, "loss_fn": "cross_entropy"},
            {"data": NO_DATA, "loss_fn": LOSS, "loss_fn_config": CONFIG},
        ),
        "forward_backward_custom": (
            lambda w: {
                "data": DATA,
                "loss_fn": lambda data, logprobs: (sum(lp.sum() for lp in logprobs), {}),
            },
            {
                "data": NO_DATA,
                "loss_fn": cases("loss", lambda x: None if callable(x) else False),
                "loss_type_input": cases("loss_type_input", only(None, "logprobs")),
            },
        ),
        "optim_step": (
            lambda w: {"optim_params": AdamParams(learning_rate=0.01)},
            {"optim_params": cases("optim_params", lambda x: isinstance(x, AdamParams)) | ADAM},
        ),
        "save_state": (
            lambda w: {"name": "new"},
            {"name": NAME, "ttl_seconds": TTL, "overwrite": cases("overwrite", flag), "user_metadata": NOTES},
        ),
        "save_weights_for_sampler": (
            lambda w: {"name": "new"},
            {"name": NAME, "ttl_seconds": TTL, "user_metadata": NOTES},
        ),
        "save_weights_external": (
            lambda w: {"name": "new"},
            {
                "name": NAME,
                "ttl_seconds": TTL,
                "age_encryption_recipients": cases("age_encryption_recipients", nothing),
            },
        ),
        "load_state": (
            lambda w: {"path": w.path},
            {"path": path_cases("path"), "weights_access_token": TOKEN},
        ),
        "load_state_with_optimizer": (
            lambda w: {"path": w.path},
            {"path": path_cases("path"), "weights_access_token": TOKEN},
        ),
        "create_sampling_client": (
            lambda w: {"model_path": w.path},
            {"model_path": path_cases("model_path"), "retry_config": RETRY, "record_stability_info": RECORD},
        ),
        "save_weights_and_get_sampling_client": (
            lambda w: {},
            {
                "name": cases("name", words),
                "retry_config": RETRY,
                "record_stability_info": RECORD,
                "kind": cases("kind", only("snapshot", "inflight")),
            },
        ),
    },
    "service": {
        "create_lora_training_client": (
            lambda w: {"base_model": model(), "rank": 1},
            {
                "base_model": model_cases("base_model"),
                "rank": cases("rank", whole(1, 1 << 20), these(10**9, 10**12, 10**400, 0)),
                "seed": cases("seed", whole(0, np.inf, none=True), near(0)),
                **LORA,
                "user_metadata": NOTES,
                "optimizer": OPTIMIZER,
            },
        ),
        "create_training_client_from_state": (
            lambda w: {"path": w.path},
            {**FROM_STATE, "optimizer": OPTIMIZER},
        ),
        "create_training_client_from_state_with_optimizer": (lambda w: {"path": w.path}, FROM_STATE),
        "copy_weights": (
            lambda w: {"path": w.path},
            {"path": path_cases("path"), "ttl_seconds": TTL, "weights_access_token": TOKEN},
        ),
        "create_sampling_client": (
            lambda w: {"model_path": w.path},
            {
                "model_path": path_cases("model_path"),
                "base_model": model_cases("base_model", none=True),
                "retry_config": RETRY,
                "record_stability_info": RECORD,
            },
        ),
        "create_custom_loss": (
            lambda w: {"fn": a_loss, "input_ranks": RANKS},
            {
                "fn": cases("fn", nowhere, None, "parameter", "takes"),
                "input_ranks": cases(
                    "input_ranks",
                    nowhere,
                    these(*[{**RANKS, "logprobs": x} for x in (0, 3, "1", None, 1.5, True)]),
                    "rank",
                ),
            },
        ),
        "close": (
            lambda w: {},
            {
                "status": cases("status", nowhere, these("Success", "", ["success"], b"errored")),
                "detail": refused(cases("detail", words)),  # else the service is closed
            },
        ),
    },
    "rest": {
        "get_training_run": (
            lambda w: {"training_run_id": w.run_id},
            {"training_run_id": RUN, "access_scope": SCOPE},
        ),
        "get_training_run_by_tinker_path": (
            lambda w: {"tinker_path": w.path},
            {"tinker_path": path_cases("tinker_path"), "access_scope": SCOPE},
        ),
        "list_training_runs": (
            lambda w: {},
            {**PAGE, "access_scope": SCOPE, "project_id": cases("project_id", nothing)},
        ),
        "list_checkpoints": (lambda w: {"training_run_id": w.run_id}, {"training_run_id": RUN}),
        "list_user_checkpoints": (lambda w: {}, PAGE),
        "get_weights_info_by_tinker_path": (lambda w: {}, {"tinker_path": path_cases("tinker_path")}),
        "get_external_weights_urls": (lambda w: {}, {"tinker_path": path_cases("tinker_path")}),
        "delete_checkpoint": (
            lambda w: {"training_run_id": w.run_id, "checkpoint_id": "weights/state"},
            {"training_run_id": RUN, "checkpoint_id": cases("checkpoint_id", nowhere, UNKNOWN, *A_PATH)},
        ),
        "delete_checkpoint_from_tinker_path": (lambda w: {}, {"tinker_path": path_cases("tinker_path")}),
        "copy_weights": (
            lambda w: {"path": w.external},
            {
                "path": path_cases("path"),
                "destination_project_id": cases("destination_project_id", nothing),
                "ttl_seconds": TTL,
                "weights_access_token": TOKEN,
            },
        ),
        "set_checkpoint_ttl_from_tinker_path": (
            lambda w: {"tinker_path": w.path, "ttl_seconds": 9},
            {"tinker_path": path_cases("tinker_path"), "ttl_seconds": TTL},
        ),
        "publish_checkpoint_from_tinker_path": (lambda w: {}, {"tinker_path": path_cases("tinker_path")}),
        "unpublish_checkpoint_from_tinker_path": (lambda w: {}, {"tinker_path": path_cases("tinker_path")}),
        "get_current_checkpoint_storage_usage": (lambda w: {}, {"project_id": cases("project_id", nothing)}),
        "list_sessions": (lambda w: {}, {**PAGE, "access_scope": SCOPE}),
        "get_session": (
            lambda w: {"session_id": w.service._session.id},
            {"session_id": cases("session_id", nowhere, None, "session"), "access_scope": SCOPE},
        ),
        "get_sampler": (lambda w: {}, {"sampler_id": cases("sampler_id", nowhere, None, "sampler")}),
    },
}
METHODS = [f"{client}.{method}" for client, methods in CALLS.items() for method in methods]
ARGUMENTS = [
    (f"{client}.{method}", argument, slot)
    for client, methods in CALLS.items()
    for method, (_, slots) in methods.items()
    for argument, slot in slots.items()
]
OTHER_NAMES = {"adam_params"}  # of optim_params
