"""How a script ends that uses a ServiceClient, and never closes it."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from small_clients import model

BEGIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a job runs in the background
import asyncio, sys, time
from minitinker import ServiceClient, types

def datum(length):
    tokens = types.ModelInput.from_ints([i % 250 for i in range(length)])
    return types.Datum(tokens, {"target_tokens": [(i + 1) % 250 for i in range(length)]})

DATA = [datum(200) for _ in range(8)]
STEP = types.AdamParams(learning_rate=1e-3)

def told(future):
    if not future.cancelled():
        print(future.exception() or future.result(), flush=True)

def train(client, steps):
    for _ in range(steps):
        client.forward_backward(DATA, "cross_entropy")
        client.optim_step(STEP)

client = ServiceClient().create_lora_training_client(sys.argv[1], rank=4)
"""


class Script:
    """A running Python program; `lines` of its output are read as they come."""

    def __init__(self, home, text):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", BEGIN + text, model()],
            env=os.environ | {"MINITINKER_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, line):
        assert self.process.stdout.readline() == f"{line}\n", self.process.communicate(timeout=30)[1]

    def interrupt(self):
        """Ctrl-C. Returns how it ends."""
        self.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        ended = self.end()
        assert time.monotonic() - began < 20  # seconds; what is queued would take minutes
        return ended

    def end(self):
        """Return code, the rest of stdout, stderr."""
        try:
            out, err = self.process.communicate(timeout=40)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


@pytest.fixture
def script(tmp_path):
    scripts = []

    def begin(text):
        scripts.append(Script(tmp_path, text))
        return scripts[-1]

    yield begin
    for one in scripts:
        one.process.kill()
        one.process.communicate()


def assert_only_traceback(err, error):
    """One traceback, that of the script itself."""
    assert err.count("Traceback") == 1, err
    assert re.fullmatch(rf"Traceback .*\n{error}.*\n", err, re.DOTALL), err
    assert "minitinker-worker" not in err


def test_a_script_that_just_ends_finishes_what_it_asked_for(script, tmp_path):
    code, out, err = script("""
train(client, 3)
client.save_state("last").future().add_done_callback(told)
""").end()
    assert (code, err) == (0, "")
    assert re.match("SaveWeightsResponse.*/weights/last", out)
    assert [folder.name for folder in tmp_path.glob("*/weights/*")] == ["last"]


def test_a_script_may_end_with_a_custom_loss_and_samples_under_way(script):
    code, out, err = script("""
def loss(data, logprobs):
    return logprobs[0].sum(), {}

sampler = client.save_weights_and_get_sampling_client()
params = types.SamplingParams(max_tokens=100, stop=[])
sampler.sample(types.ModelInput.from_ints([1]), 2, params).future().add_done_callback(told)
client.forward_backward_custom(DATA, loss).future().add_done_callback(told)
""").end()
    assert (code, err) == (0, "")
    assert sorted(line.split("(")[0] for line in out.splitlines()) == [
        "ForwardBackwardOutput",
        "SampleResponse",
    ]


def test_a_script_that_exits_finishes_what_it_asked_for(script, tmp_path):
    code, _, err = script("""
train(client, 2)
client.save_state("last")
sys.exit(3)
""").end()
    assert (code, err) == (3, "")
    assert [folder.name for folder in tmp_path.glob("*/weights/*")] == ["last"]


def test_a_script_that_fails_drops_what_has_not_begun(script, tmp_path):
    code, out, err = script("""
train(client, 2000)
client.save_state("last").future().add_done_callback(told)
1 / 0
""").end()
    assert (code, out) == (1, "")
    assert_only_traceback(err, "ZeroDivisionError")
    assert not list(tmp_path.glob("*/weights/*"))


WAITING = {
    "for a result": """
train(client, 2000)
client.forward(DATA, "cross_entropy").result()
""",
    "for a sample": """
sampler = client.save_weights_and_get_sampling_client()
params = types.SamplingParams(stop=[])
futures = [sampler.sample(types.ModelInput.from_ints([1]), 16, params) for _ in range(100)]
[future.result() for future in futures]
""",
    "in an event loop": """
async def main():
    while True:
        await (await client.forward_backward_async(DATA, "cross_entropy"))
        await client.optim_step(STEP)
asyncio.run(main())
""",
    "in a loop of its own": """
while True:
    train(client, 1)
    time.sleep(0.01)
""",
    "for the service to close": """
train(client, 2000)
client._session.worker.close(finish=True)
""",
}


@pytest.mark.parametrize("wait", WAITING)
def test_ctrl_c_ends_a_script_that_waits(script, wait):
    running = script(f"client.result()\nprint('ready', flush=True)\n{WAITING[wait]}")
    running.wait_for("ready")
    time.sleep(0.2)
    code, _, err = running.interrupt()
    assert code == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert "minitinker-worker" not in err


def test_a_script_may_catch_ctrl_c_save_and_end(script, tmp_path):
    running = script("""
client.result()
try:
    print("ready", flush=True)
    while True:
        train(client, 1)
        client.get_info()
except KeyboardInterrupt:
    client.save_state("interrupted")
""")
    running.wait_for("ready")
    code, _, err = running.interrupt()
    assert (code, err) == (0, "")
    assert [folder.name for folder in tmp_path.glob("*/weights/*")] == ["interrupted"]


def test_ctrl_c_ends_a_script_that_has_ended_but_for_its_queue(script):
    running = script("""
train(client, 2000)
client.result()
print("ready", flush=True)
""")
    running.wait_for("ready")
    time.sleep(0.5)
    running.interrupt()
