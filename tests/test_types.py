import dataclasses
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime

import numpy as np
import pytest
import tinker.types as theirs
import torch
from tinker.types.topk_logprobs import TopkLogprobs as TheirTopkLogprobs
from tinker.types.topk_logprobs import topk_to_lists

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
    TopkLogprobs,
)

CLASSES = [getattr(types, name) for name in types.__all__ if dataclasses.is_dataclass(getattr(types, name))]


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
    top = TopkLogprobs(np.int32([[4, 1], [5, 2]]), np.float32([[-1.5, -2], [-0.5, -3]]))
    sample = SampledSequence("stop", "s", np.array([4, 5]), [-1.5, -0.5], top)
    assert (sample.tokens, sample.logprobs) == ([4, 5], [-1.5, -0.5])
    assert sample.topk_logprobs == [[(4, -1.5), (1, -2.0)], [(5, -0.5), (2, -3.0)]]
    assert sample.tokens_np.dtype == np.int32
    assert sample.logprobs_np.dtype == np.float32
    bare = SampledSequence("length", "s", [])
    assert (bare.tokens, bare.logprobs, bare.topk_logprobs) == ([], None, None)


def test_prompt_logprobs_are_nan_in_the_array_where_the_list_has_none():
    top = TopkLogprobs(np.int32([[0], [3]]), np.float32([[-99999], [-0.5]]))
    response = SampleResponse([], [None, -0.5], top)
    assert response.prompt_logprobs == [None, -0.5]
    assert response.topk_prompt_logprobs == [None, [(3, -0.5)]]
    np.testing.assert_array_equal(response.prompt_logprobs_np, np.array([np.nan, -0.5], np.float32))
    assert SampleResponse([]).prompt_logprobs is None
    assert SampleResponse([]).topk_prompt_logprobs is None


@pytest.mark.parametrize("k", [1, 3])
def test_lists_of_the_likeliest_tokens_are_those_of_the_client_library(k):
    rng = np.random.default_rng(0)
    tokens, logprobs = (
        rng.integers(0, 9, (4, k)).astype(np.int32),
        rng.normal(-3, 1, (4, k)).astype(np.float32),
    )
    tokens[0], logprobs[0] = 0, -99999
    assert TopkLogprobs(tokens, logprobs).to_lists() == topk_to_lists(TheirTopkLogprobs(tokens, logprobs))


def test_samples_are_equal_where_all_their_numbers_are():
    def response(logprob):
        return SampleResponse([SampledSequence("stop", "s", [1], [logprob])], [None, -0.5])

    assert response(-1.0) == response(-1.0) != response(-2.0)
    assert response(-1.0) != "a response"


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


# Images and sound


@pytest.mark.parametrize("cls", [theirs, types], ids=["theirs", "ours"])
def test_an_image_may_be_given_in_base64(cls):
    assert cls.ImageChunk(data="aGk=", format="png") == cls.ImageChunk(data=b"hi", format="png")
    assert cls.DmelChunk(dmel="aGk=").dmel == b"hi"


def test_an_image_has_the_length_that_was_expected_and_no_text():
    image = types.ImageChunk(data=b"hi", format="jpeg", expected_tokens=3)
    pointer = types.ImageAssetPointerChunk(location="a.png", format="png", expected_tokens=2)
    both = ModelInput.from_ints([1]).append(image).append(pointer)
    assert both.length == 6
    with pytest.raises(
        BadRequestError, match=r"chunks\[1\] is of type ImageChunk; the models here read text"
    ):
        both.to_ints()


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (types.ImageChunk(data=b"", format="png"), "ImageChunk.expected_tokens is None"),
        (types.ImageAssetPointerChunk(location="", format="png"), "ImageAssetPointerChunk.expected_tokens"),
        (types.DmelChunk(dmel=b""), "no model of this library hears"),
    ],
)
def test_what_has_no_known_length_says_so(chunk, message):
    with pytest.raises(BadRequestError, match=message):
        chunk.length  # noqa: B018


def test_an_image_wants_bytes_or_base64():
    with pytest.raises(ValueError, match=r"ImageChunk.data is text that is not base64"):
        types.ImageChunk(data="?", format="png")
    with pytest.raises(TypeError, match=r"ImageChunk.data is 3"):
        types.ImageChunk(data=3, format="png")


# Where tokens came from


def test_provenance_covers_a_datum_exactly():
    prompt = types.PromptProvenanceSpan(sequence_id="a", length=2)
    sampled = types.SampledProvenanceSpan(sequence_id="a", offset=1, length=1)
    bare = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    known = bare.with_provenance([prompt, sampled], [sampled, prompt])
    assert known.model_input_spans == [prompt, sampled]
    assert known.loss_fn_input_spans == [sampled, prompt]
    assert (bare.model_input_spans, known.loss_fn_inputs) == (None, bare.loss_fn_inputs)
    with pytest.raises(ValueError, match="the spans of model_input cover 2 positions; they must cover all 3"):
        bare.with_provenance([prompt], [prompt, sampled])
    with pytest.raises(ValueError, match="the spans of loss_fn_inputs cover 1 positions"):
        bare.with_provenance([prompt, sampled], [sampled])
    with pytest.raises(ValueError, match="come together or not at all"):
        Datum(bare.model_input, {}, [prompt])
    with pytest.raises(TypeError, match=r"model_input_spans\[0\] is a int"):
        Datum(bare.model_input, {}, [3], [prompt])


@pytest.mark.parametrize("change", [{"sequence_id": ""}, {"offset": -1}, {"length": -1}])
def test_a_span_that_cannot_be_is_refused_as_by_the_client_library(change):
    for cls in (types.PromptProvenanceSpan, theirs.PromptProvenanceSpan):
        with pytest.raises(ValueError, match=next(iter(change))):
            cls(**{"sequence_id": "a", "length": 1} | change)
