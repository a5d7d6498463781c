"""samplers.py: clients that are sent by pickle or by handle."""

import copy
import gc
import pickle
import subprocess
import sys

import pytest
from small_clients import draw, model, tokens, train

from minitinker import SamplingClient
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.hosted import HostedServiceError

WAYS = {
    "pickle": lambda client: pickle.loads(pickle.dumps(client)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "handle": lambda client: SamplingClient.from_sampler_handle(
        client.get_sampler_handle(), api_key="ignored"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_samples_what_its_original_samples_also_when_that_is_gone(trained, way):
    _, client = trained
    expected = tokens(draw(client, 2))
    again = WAYS[way](client)
    assert again is not client
    assert again.get_sampler_handle() == client.get_sampler_handle()
    del trained, client
    gc.collect()
    assert tokens(draw(WAYS[way](again), 2)) == expected
    assert again.get_base_model() == model()


def test_a_client_that_is_not_made_yet_can_be_sent(service, held):
    client = service.create_sampling_client(base_model=model())
    again = pickle.loads(pickle.dumps(client))
    held.set()
    assert again.result().get_base_model() == client.get_base_model()


def test_a_copy_of_an_inflight_client_follows_its_run_too(client):
    train(client)
    inflight = client.save_weights_and_get_sampling_client(kind="inflight")
    again = pickle.loads(pickle.dumps(inflight))
    before = tokens(draw(again, 3))
    train(client)
    client.save_weights_and_get_sampling_client(kind="inflight").result()
    assert tokens(draw(again, 3)) == tokens(draw(inflight, 3)) != before


def test_a_handle_outlives_no_sampler(client):
    handle = client.save_weights_and_get_sampling_client().result().get_sampler_handle()
    gc.collect()
    with pytest.raises(NotFoundError, match="no client of the sampler"):
        SamplingClient.from_sampler_handle(handle)


@pytest.mark.parametrize("handle", ["", "tinker://a", None, 3, b"minitinker-sampler:1:2"])
def test_what_is_no_handle_is_refused(handle):
    with pytest.raises(BadRequestError, match="it must come from get_sampler_handle"):
        SamplingClient.from_sampler_handle(handle)


OTHER_PROCESS = "belongs to the hosted service; on one machine the weights stay in process"


def test_another_process_is_told_what_to_do_instead(trained, tmp_path):
    _, client = trained
    (tmp_path / "client").write_bytes(pickle.dumps(client))
    script = f"import pickle; pickle.loads(open({str(tmp_path / 'client')!r}, 'rb').read())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"HostedServiceError: a SamplingClient sent to another process {OTHER_PROCESS}" in done.stderr
    assert "create_sampling_client(model_path=...)" in done.stderr


def test_a_process_that_was_forked_and_knows_the_handle_is_another_process_too(trained):
    _, client = trained
    process, _, name = client.get_sampler_handle().removeprefix("minitinker-sampler:").partition(":")
    with pytest.raises(HostedServiceError, match=OTHER_PROCESS):
        SamplingClient.from_sampler_handle(f"minitinker-sampler:{int(process) + 1}:{name}")
