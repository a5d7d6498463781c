"""types/dumping.py: dicts, JSON and copies of types are those of the real library's pydantic models."""

import dataclasses
import math
from datetime import UTC, datetime

import pydantic
import pytest
import tinker.types as theirs

from minitinker import types
from minitinker.types.dumping import Dumpable

METHODS = ["model_dump", "model_dump_json", "model_copy", "model_validate", "model_validate_json"]
MODELS = [kind for name in types.__all__ if Dumpable in getattr(kind := getattr(types, name), "__mro__", ())]
TIME = datetime(2026, 1, 31, 12, 30, 5, 7, UTC)


def run(kinds):
    checkpoint = kinds.Checkpoint(
        checkpoint_id="weights/a",
        checkpoint_type="training",
        time=TIME,
        tinker_path="tinker://r/weights/a",
        user_metadata={"é": "ü"},
    )
    return kinds.TrainingRun(
        training_run_id="r",
        base_model="m",
        model_owner="o",
        is_lora=True,
        last_request_time=TIME,
        last_checkpoint=checkpoint,
    )


# Each made of a package's types, once of ours and once of the real library's.
MADE = {
    "params": lambda kinds: kinds.SamplingParams(max_tokens=3, stop=["a", "b"], temperature=0.5, top_p=0.9),
    "adam": lambda kinds: kinds.AdamParams(learning_rate=1e-3),
    "text": lambda kinds: kinds.ModelInput.from_ints([1, 2]),
    "image": lambda kinds: kinds.ModelInput(
        chunks=[kinds.ImageChunk(data=b"\xff\x00", format="png"), kinds.EncodedTextChunk(tokens=[3])]
    ),
    "run": run,
    "runs": lambda kinds: kinds.TrainingRunsResponse(
        training_runs=[run(kinds)], cursor=kinds.Cursor(offset=0, limit=1, total_count=2)
    ),
    "weights": lambda kinds: kinds.WeightsInfoResponse(base_model="m", is_lora=True),
    "metrics": lambda kinds: kinds.OptimStepResponse(metrics={"a": 1.5}),
    "none": lambda kinds: kinds.OptimStepResponse(metrics=None),
}
OPTIONS = [
    {},
    {"exclude_none": True},
    {"include": {"chunks", "max_tokens", "last_checkpoint"}},
    {"exclude": {"top_k", "training_runs", "time"}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "none")
@pytest.mark.parametrize("name", MADE)
def test_dicts_and_json_are_those_of_the_library(name, options):
    ours, their = MADE[name](types), MADE[name](theirs)
    assert ours.model_dump(**options) == their.model_dump(**options)
    assert ours.model_dump(mode="json", **options) == their.model_dump(mode="json", **options)
    assert ours.model_dump_json(**options) == their.model_dump_json(**options)
    assert ours.model_dump_json(indent=2, **options) == their.model_dump_json(indent=2, **options)


@pytest.mark.parametrize("name", MADE)
def test_what_is_read_from_a_dict_or_json_is_what_was_written(name):
    ours, their = MADE[name](types), MADE[name](theirs)
    kind = type(ours)
    assert kind.model_validate(their.model_dump()) == ours
    assert kind.model_validate(ours.model_dump(mode="json")) == ours
    assert kind.model_validate_json(their.model_dump_json()) == ours
    assert kind.model_validate(ours) is ours


def test_a_copy_with_other_fields_is_checked_like_any_other():
    params = types.SamplingParams(stop=["a"])
    assert params.model_copy(update={"seed": 3}) == types.SamplingParams(stop=["a"], seed=3)
    assert params.model_copy(deep=True) == params
    params.model_copy().stop.append("b")
    assert params.stop == ["a"]
    with pytest.raises(TypeError, match=r"SamplingParams.seed is 'x' \(str\); it must be int \| None"):
        params.model_copy(update={"seed": "x"})
    with pytest.raises(TypeError, match="seeed"):
        params.model_copy(update={"seeed": 1})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_null_in_it_as_in_the_library(number):
    ours, their = (kinds.OptimStepResponse(metrics={"a": number, "b": 1.0}) for kinds in (types, theirs))
    assert ours.model_dump_json() == their.model_dump_json() == '{"metrics":{"a":null,"b":1.0}}'
    assert str(ours.model_dump(mode="json")) == str(their.model_dump(mode="json"))


@pytest.mark.parametrize("chosen", [{"chunks": {0: {"type"}}}, "chunks", 3])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_choice_that_is_no_set_of_names_is_refused(option, chosen):
    for dump in (types.ModelInput.empty().model_dump, types.ModelInput.empty().model_dump_json):
        with pytest.raises(TypeError, match=f"{option} is .*; it must be a set of names of fields, or None"):
            dump(**{option: chosen})


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_field_that_is_not_there_is_refused_also_where_the_library_ignores_it(kind):
    with pytest.raises(
        TypeError, match=rf"{kind.__name__}.__init__\(\) got an unexpected .* 'no_such_field'"
    ):
        kind(no_such_field=1)
    with pytest.raises(TypeError, match="no_such_field"):
        kind.model_validate({"no_such_field": 1})


def test_what_does_not_conform_is_refused_by_its_name():
    with pytest.raises(TypeError, match=r"ModelInput.chunks\[0\] is {'tokens': 'a'} \(dict\)"):
        types.ModelInput.model_validate({"chunks": [{"tokens": "a"}]})
    with pytest.raises(TypeError, match=r"TrainingRunsResponse.cursor: Cursor.limit is None"):
        types.TrainingRunsResponse(training_runs=[], cursor={"offset": 0, "limit": None, "total_count": 1})
    with pytest.raises(TypeError, match="AdamParams is 3"):
        types.AdamParams.model_validate(3)
    with pytest.raises(ValueError, match="Expecting value"):
        types.AdamParams.model_validate_json("learning_rate")
    with pytest.raises(ValueError, match="mode is 'yaml'"):
        types.AdamParams().model_dump(mode="yaml")


def test_the_types_that_have_these_methods_are_those_of_the_library_that_do():
    for name in types.__all__:
        ours, their = getattr(types, name), getattr(theirs, name, None)
        if dataclasses.is_dataclass(ours) and their is not None:
            models = issubclass(their, pydantic.BaseModel)
            assert issubclass(ours, Dumpable) == models, name
            assert all(hasattr(ours, method) for method in METHODS) == models, name
