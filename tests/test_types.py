import dataclasses
import inspect
import typing
from dataclasses import MISSING, FrozenInstanceError
from datetime import UTC, datetime

import numpy as np
import pydantic
import pytest
import tinker.types as theirs
import torch

from minitinker import types
from minitinker.errors import BadRequestError
from minitinker.types import (
    AdamParams,
    Checkpoint,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoraConfig,
    ModelData,
    ModelInput,
    ParsedCheckpointTinkerPath,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
)

CLASSES = [getattr(types, name) for name in types.__all__ if dataclasses.is_dataclass(getattr(types, name))]

# Where our fields differ from those of the client library, and why.
ADDED = {
    "ModelData": {"model_id", "lora_rank"},  # the API's document prints them
    "SampledSequence": {
        "tokens",
        "logprobs",
    },  # theirs are properties over tokens_np, ours the other way round
    "SampleResponse": {"prompt_logprobs", "topk_prompt_logprobs"},
}
LEFT_OUT = {
    "Datum": {"model_input_spans", "loss_fn_input_spans"},
    "GetInfoResponse": {"optimizer_config"},
    "SampledSequence": {"tokens_np", "logprobs_np", "topk_logprobs_np"},
    "SampleResponse": {
        "prompt_logprobs_np",
        "topk_prompt_logprobs_np",
        "target_prompt_logprobs",
        "prompt_cache_hit_tokens",
        "prompt_alt_tokens",
    },
}

NO_PLACE_HERE = {
    # provenance and web pages
    "model_input_spans",
    "loss_fn_input_spans",
    "with_provenance",
    "get_console_url",
    "get_playground_url",
    # not yet
    "topk_logprobs",
    "topk_logprobs_np",
    "topk_prompt_logprobs_np",
    "target_prompt_logprobs",
    "prompt_cache_hit_tokens",
    "prompt_alt_tokens",
}


def fields_of(cls):
    """Public field -> default, or MISSING where it must be given; for dataclasses and pydantic models."""
    if issubclass(cls, pydantic.BaseModel):
        return {
            name: MISSING if field.is_required() else field.get_default(call_default_factory=True)
            for name, field in cls.model_fields.items()
        }
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in dataclasses.fields(cls)
        if not field.name.startswith("_")
    }


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_fields_and_defaults_are_those_of_the_client_library(cls):
    ours, real = fields_of(cls), fields_of(getattr(theirs, cls.__name__))
    assert ours.keys() - real.keys() == ADDED.get(cls.__name__, set())
    assert real.keys() - ours.keys() == LEFT_OUT.get(cls.__name__, set())
    if cls is Datum:  # has its own __init__
        defaults = inspect.signature(Datum).parameters
        assert defaults["model_input"].default is inspect.Parameter.empty
        assert Datum(ModelInput.empty()).loss_fn_inputs == real["loss_fn_inputs"]
    else:
        assert {name: ours[name] for name in ours.keys() & real.keys()} == {
            name: real[name] for name in ours.keys() & real.keys()
        }


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_only_keywords_are_taken_where_the_client_library_takes_only_keywords(cls):
    parameters = list(inspect.signature(cls).parameters.values())
    keyword_only = issubclass(getattr(theirs, cls.__name__), pydantic.BaseModel)
    assert all((one.kind is one.KEYWORD_ONLY) == keyword_only for one in parameters)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_methods_and_properties_of_the_client_library_are_there(cls):
    real = getattr(theirs, cls.__name__)
    public = {name for name in dir(real) if not name.startswith("_")} - set(dir(pydantic.BaseModel))
    assert public - set(dir(cls)) - fields_of(cls).keys() <= NO_PLACE_HERE


@pytest.mark.parametrize("name", ["TensorDtype", "StopReason", "CheckpointType"])
def test_literals_are_those_of_the_client_library(name):
    assert typing.get_args(getattr(types, name)) == typing.get_args(getattr(theirs, name))


def test_loss_names_are_among_those_of_the_client_library():
    ours = set(typing.get_args(types.LossFnType))
    assert ours < set(typing.get_args(theirs.LossFnType))
    assert ours == {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro"}


def test_tensor_data_takes_the_arguments_of_the_client_library_in_its_order():
    ours = list(inspect.signature(TensorData).parameters)
    assert ours == list(inspect.signature(theirs.TensorData).parameters)[: len(ours)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_nothing_changes_once_made_and_unknown_fields_are_refused(cls):
    assert cls.__dataclass_params__.frozen
    with pytest.raises(TypeError, match="no_such_field"):
        cls(no_such_field=1)


def test_a_field_cannot_be_set():
    with pytest.raises(FrozenInstanceError):
        AdamParams().learning_rate = 1.0


# Inputs


def test_tokens_come_back_as_they_went_in():
    for tokens in ([], [5], list(range(100))):
        model_input = ModelInput.from_ints(tokens)
        assert model_input.to_ints() == tokens
        assert model_input.length == len(tokens)
        assert [chunk.type for chunk in model_input.chunks] == ["encoded_text"]


@pytest.mark.parametrize("tokens", [(3, 1), np.array([3, 1]), torch.tensor([3, 1]), [np.int32(3), 1]])
def test_tokens_may_be_any_sequence_of_whole_numbers(tokens):
    assert ModelInput.from_ints(tokens) == ModelInput.from_ints([3, 1])
    assert {type(token) for token in ModelInput.from_ints(tokens).to_ints()} == {int}


def test_appending_makes_a_new_input():
    empty = ModelInput.empty()
    longer = empty.append(EncodedTextChunk(tokens=[1, 2])).append_int(3)
    assert (empty.length, longer.length) == (0, 3)
    assert longer.to_ints() == [1, 2, 3]
    assert [chunk.length for chunk in longer.chunks] == [2, 1]


def test_editing_the_tokens_afterwards_changes_nothing():
    tokens, chunks = [1, 2], [EncodedTextChunk(tokens=[3])]
    from_tokens, from_chunks = ModelInput.from_ints(tokens), ModelInput(chunks=chunks)
    tokens.append(9)
    chunks.append(chunks[0])
    assert (from_tokens.to_ints(), from_chunks.to_ints()) == ([1, 2], [3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ModelInput.from_ints("abc"),
            r"EncodedTextChunk.tokens is 'abc' \(str\); it must be list\[int\]",
        ),
        (lambda: ModelInput.from_ints([1, 2.5]), r"EncodedTextChunk.tokens\[1\] is 2.5"),
        (lambda: ModelInput(chunks=[[1, 2]]), r"ModelInput.chunks\[0\] .* it must be EncodedTextChunk"),
        (lambda: AdamParams(learning_rate="fast"), "AdamParams.learning_rate is 'fast'"),
        (lambda: AdamParams(beta1=None), "AdamParams.beta1 is None"),
        (lambda: SamplingParams(max_tokens=2.5), "SamplingParams.max_tokens is 2.5"),
        (lambda: SamplingParams(stop=[["a"]]), "SamplingParams.stop is"),
        (lambda: LoraConfig(rank=None), "LoraConfig.rank is None"),
        (lambda: SampledSequence("eos", "0", [1]), "SampledSequence.stop_reason is 'eos'"),
        (lambda: Datum([1, 2]), "Datum.model_input is of type list; make a ModelInput"),
    ],
)
def test_wrong_types_are_refused_by_field_and_value(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_ranges_are_not_checked_here():
    assert AdamParams(learning_rate=-1, beta1=7).beta1 == 7.0
    assert SamplingParams(temperature=-1, top_k=0, max_tokens=0).top_k == 0
    assert LoraConfig(rank=0).rank == 0
    assert EncodedTextChunk(tokens=[-5]).tokens == [-5]


def datum(**loss_fn_inputs):
    return Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs=loss_fn_inputs)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [("target_tokens", "int64"), ("weights", "float32"), ("advantages", "float32"), ("logprobs", "float32")],
)
def test_a_list_gets_the_dtype_of_its_key_as_in_the_client_library(key, dtype):
    for numbers in ([1, 0], [1.0, 0.0], [True, False], [[1, 0], [0, 1]], []):
        ours = datum(**{key: numbers}).loss_fn_inputs[key]
        real_input = theirs.ModelInput.from_ints([1, 2])
        real = theirs.Datum(model_input=real_input, loss_fn_inputs={key: numbers}).loss_fn_inputs[key]
        assert (ours.dtype, ours.shape, ours.data) == (real.dtype, real.shape, real.data)
        assert ours.dtype == dtype


@pytest.mark.parametrize(
    "value",
    [
        TensorData([3, 4], "int64"),
        np.array([3, 4]),
        np.array([3, 4], dtype=np.int32),
        torch.tensor([3, 4]),
        [3, 4],
        (3, 4),
        ModelInput.from_ints([3, 4]),
        ModelInput.from_ints([3]).append_int(4),
    ],
)
def test_loss_fn_inputs_of_every_kind_become_the_same_tensor(value):
    assert datum(target_tokens=value) == datum(target_tokens=TensorData([3, 4], "int64"))


def test_a_list_under_another_key_is_typed_by_its_values():
    assert datum(mask=[1, 0]).loss_fn_inputs["mask"].dtype == "int64"
    assert datum(mask=[1, 0.5]).loss_fn_inputs["mask"].dtype == "float32"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([[1], [2, 3]], ValueError, "ragged"),
        ([2**63], ValueError, "outside of int64"),
        ([1.5], ValueError, "not whole"),
        (["a"], TypeError, "not numbers"),
        (np.array([True]), TypeError, "dtype bool"),
        ("ab", TypeError, "str is not a tensor"),
        (None, TypeError, "NoneType is not a tensor"),
    ],
)
def test_a_wrong_loss_fn_input_is_refused_by_key(value, error, message):
    with pytest.raises(error, match=rf"loss_fn_inputs\['target_tokens'\]: .*{message}"):
        datum(target_tokens=value)


def test_editing_loss_fn_inputs_afterwards_changes_nothing():
    weights = np.ones(2, dtype=np.float32)
    inputs = {"weights": weights}
    made = Datum(ModelInput.from_ints([1, 2]), inputs)
    weights[:] = 9
    inputs["advantages"] = weights
    assert made == datum(weights=[1, 1])


def test_datums_with_other_values_differ():
    assert datum(weights=[1, 1]) == datum(weights=[1, 1])
    assert datum(weights=[1, 1]) != datum(weights=[1, 2])
    assert dataclasses.replace(datum(weights=[1, 1]), loss_fn_inputs={"weights": [1, 2]}) == datum(
        weights=[1, 2]
    )


# Outputs


def output(loss):
    logprobs = [{"logprobs": TensorData([loss], "float32")}]
    return ForwardBackwardOutput("scalar", logprobs, {"loss:sum": loss})


def test_the_loss_is_the_summed_one():
    assert output(2.5).loss == output(2.5).metrics["loss:sum"] == 2.5
    assert output(2.5) == output(2.5) != output(3.5)
    with pytest.raises(KeyError, match="loss:sum"):
        assert ForwardBackwardOutput("scalar", []).loss


def test_a_sample_is_given_as_lists_and_as_arrays():
    sample = SampledSequence(
        stop_reason="stop", sequence_id="s", tokens=np.array([4, 5]), logprobs=[-1.5, -0.5]
    )
    assert (sample.tokens, sample.logprobs) == ([4, 5], [-1.5, -0.5])
    assert sample.tokens_np.dtype == np.int32
    assert sample.logprobs_np.dtype == np.float32
    assert (sample.tokens_np.tolist(), sample.logprobs_np.tolist()) == ([4, 5], [-1.5, -0.5])
    assert SampledSequence("length", "s", []).logprobs_np is None
    assert SampledSequence("length", "s", []).tokens_np.shape == (0,)


def test_prompt_logprobs_are_nan_in_the_array_where_the_list_has_none():
    response = SampleResponse([], [None, -0.5], [None, [(3, -0.5)]])
    assert response.prompt_logprobs == [None, -0.5]
    assert response.topk_prompt_logprobs == [None, [(3, -0.5)]]
    np.testing.assert_array_equal(response.prompt_logprobs_np, np.array([np.nan, -0.5], np.float32))
    assert SampleResponse([]).prompt_logprobs_np is None


def test_the_info_has_what_the_document_prints():
    data = ModelData(model_id="run-1", model_name="minitinker/tiny", lora_rank=8)
    info = GetInfoResponse(model_data=data, model_id="run-1", is_lora=True)
    assert info.model_data.model_id == "run-1"
    assert info.model_data.model_name == "minitinker/tiny"
    assert info.model_data.lora_rank == 8


def test_a_checkpoint_wants_a_real_date():
    now = datetime.now(UTC)
    known = {
        "checkpoint_id": "weights/a",
        "checkpoint_type": "training",
        "tinker_path": "tinker://r/weights/a",
    }
    assert Checkpoint(time=now, **known).time == now
    with pytest.raises(TypeError, match=r"Checkpoint.time is 'today'"):
        Checkpoint(time="today", **known)


@pytest.mark.parametrize(
    "path",
    ["tinker://run/weights/a", "tinker://run/sampler_weights/a.b-c", "tinker://run/external_weights/a"],
)
def test_paths_are_parsed_as_by_the_client_library(path):
    ours = ParsedCheckpointTinkerPath.from_tinker_path(path)
    real = theirs.ParsedCheckpointTinkerPath.from_tinker_path(path)
    assert dataclasses.asdict(ours) == real.model_dump()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "run/weights/a",
        "file://run/weights/a",
        "tinker:/run/weights/a",
        "tinker://run/weights",
        "tinker://run/weights/a/b",
        "tinker://run/other/a",
        "tinker:///weights/a",
        "tinker://run/weights/",
        "tinker://run/weights/..",
        "tinker://../weights/a",
        "tinker://./weights/a",
        None,
    ],
)
def test_a_malformed_path_is_a_bad_request_that_shows_the_right_form(path):
    with pytest.raises(BadRequestError, match="it must be tinker://<run-id>/weights/<name>"):
        ParsedCheckpointTinkerPath.from_tinker_path(path)
