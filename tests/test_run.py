"""python -m minitinker.run: a script or module runs as Python itself would run it, with another tinker."""

import subprocess
import sys

import pytest

REPORT = """
import __main__, os, pickle, sys
import neighbour

class Own:
    pass

print(sys.argv, sys.path, __name__, __file__, __package__, __spec__ and __spec__.name, __cached__, __doc__)
print(type(__loader__).__name__, __builtins__, __main__.Own is Own, type(pickle.loads(pickle.dumps(Own()))) is Own)
print(sorted(globals()), neighbour.HERE, os.getcwd())
"""
ENDINGS = {
    "pass": 0,
    "import sys; sys.exit()": 0,
    "import sys; sys.exit(7)": 7,
    "import sys; sys.exit('what went wrong')": 1,
    "raise SystemExit(3)": 3,
    "raise KeyError('what went wrong')": 1,
    "import os; os._exit(5)": 5,
    "def": 1,  # no Python
}


def run(*arguments, cwd):
    """A finished process: python with these arguments."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


@pytest.fixture
def folder(tmp_path):
    """Scripts and modules in a folder, and a link to one of them elsewhere."""
    scripts = tmp_path / "scripts"
    (scripts / "package").mkdir(parents=True)
    (tmp_path / "links").mkdir()
    for name in ("report.py", "package/__main__.py"):
        (scripts / name).write_text(REPORT)
    for name in ("neighbour.py", "package/__init__.py"):
        (scripts / name).write_text("HERE = __name__\n")
    (tmp_path / "links" / "link.py").symlink_to(scripts / "report.py")
    return tmp_path


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        (".", ["scripts/report.py", "a", "-b", "--c=d"]),
        ("scripts", ["report.py"]),
        (".", ["links/link.py", "-m", "x"]),
        ("scripts", ["-m", "report", "a", "-m"]),
        ("scripts", ["-m", "package", "a"]),
        ("scripts", ["-m", "package.__main__"]),
    ],
)
def test_a_script_sees_what_it_sees_without(folder, where, arguments):
    plain = run(*arguments, cwd=folder / where)
    ours = run("-m", "minitinker.run", *arguments, cwd=folder / where)
    assert plain.returncode == 0, plain.stderr
    assert ours.stdout == plain.stdout
    assert ours.stderr == plain.stderr == ""


@pytest.mark.parametrize("flag", ["-P", "-I"])
def test_a_safe_path_stays_safe(folder, flag):
    (folder / "path.py").write_text("import sys; print(sys.path)")
    plain = run(flag, "path.py", cwd=folder)
    assert run(flag, "-m", "minitinker.run", "path.py", cwd=folder).stdout == plain.stdout


@pytest.mark.parametrize("code", ENDINGS)
@pytest.mark.parametrize("module", [False, True])
def test_it_ends_as_the_script_ends(tmp_path, code, module):
    (tmp_path / "script.py").write_text("print('begun')\n" + code)
    arguments = ["-m", "script"] if module else ["script.py"]
    done = run("-m", "minitinker.run", *arguments, cwd=tmp_path)
    assert done.returncode == ENDINGS[code]
    assert done.stdout == ("" if code == "def" else "begun\n")
    assert ("what went wrong" in done.stderr) == ("what went wrong" in code)
    assert done.returncode == run(*arguments, cwd=tmp_path).returncode


def test_tinker_is_this_package_in_the_script_and_what_it_imports(tmp_path):
    (tmp_path / "helper.py").write_text("from tinker import types\n")
    (tmp_path / "script.py").write_text(
        "import helper, tinker\nprint(helper.types.Datum is tinker.Datum, tinker.Datum)"
    )
    for arguments in (["script.py"], ["-m", "script"]):
        printed = run("-m", "minitinker.run", *arguments, cwd=tmp_path).stdout
        assert printed == "True <class 'minitinker.types.data.Datum'>\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give a script, or -m and a module"),
        (["-m"], 2, "give a script, or -m and a module"),
        (["-x", "script.py"], 2, "give a script, or -m and a module"),
        (["missing.py"], 2, "missing.py': there is no such file"),
        (["."], 2, "there is no such file"),
        (["-m", "missing"], 1, "there is no module missing"),
        (["-m", "missing.part"], 1, "there is no module missing.part"),
        (["-m", "sys"], 1, "there is no module sys that can be run"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path, arguments, status, message):
    done = run("-m", "minitinker.run", *arguments, cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr.startswith("minitinker.run: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_says_how_it_is_called(tmp_path):
    assert "python -m minitinker.run -m MODULE" in run("-m", "minitinker.run", "--help", cwd=tmp_path).stdout


TRAIN = """
import asyncio
import tinker
from tinker import types

async def main():
    service = tinker.ServiceClient(base_url=None, user_metadata={"recipe": "one"})
    client = await service.create_lora_training_client_async(base_model="minitinker/tiny", rank=4, seed=0)
    tokens = client.get_tokenizer().encode("plus 3 4 7")
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]}
    )
    for _ in range(3):
        losses = await client.forward_backward_async([datum], "cross_entropy")
        step = await client.optim_step_async(tinker.AdamParams(learning_rate=3e-3))
        print((await losses.result_async()).metrics["loss:sum"])
        await step
    assert isinstance(losses, tinker.APIFuture)

asyncio.run(main())
"""


def test_a_script_of_the_hosted_service_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path / "home"))
    (tmp_path / "script.py").write_text(TRAIN)
    done = run("-m", "minitinker.run", "script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
