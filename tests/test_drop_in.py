"""install_as_tinker, each time in a process of its own: the suite's has the real library."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest
import tinker
import tinker.lib.public_interfaces

import minitinker
from minitinker import types
from minitinker.drop_in import VERSION, _module_of
from minitinker.left_out import WHY

INSTALL = "import minitinker; minitinker.install_as_tinker()\n"


def python(code, *arguments):
    """What a new process prints that runs the code."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def public_paths():
    """The public modules of the real library, and in each the names that are here or in the table."""
    known = {*minitinker.__all__, *types.__all__, *(name.removeprefix("types.") for name in WHY)}
    modules = [
        tinker,
        tinker.types,
        tinker.lib.public_interfaces,
        importlib.import_module("tinker.lib.experimental"),
    ]
    for package in (tinker.types, tinker.lib.public_interfaces):
        names = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name[0] != "_"]
        modules += [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    held = {
        module.__name__: {name for name in known & set(vars(module)) if name[0].isupper()}
        for module in modules
    }
    return {name: sorted(names) for name, names in held.items()}


# Modules of the library that hold nothing but what is left out, beside what they import.
LEFT_OUT_MODULES = {_module_of(name) for name in WHY} | {
    "lib.public_interfaces.admin_client",
    "lib.public_interfaces.backcompat_client_future",
}


TRY = """
import importlib, json, sys
from minitinker import types
for module, names in json.loads(sys.argv[1]).items():
    for name in names:
        try:
            found = {}
            exec(f"from {module} import {name}", found)
            print(module, name, found[name] is getattr(types, name, getattr(minitinker, name, None)))
        except ImportError as error:
            print(module, name, error)
"""


def test_every_public_path_of_the_library_gives_this_packages_object_or_says_why_it_is_left_out():
    paths = public_paths()
    assert len(paths) > 100
    answers = [line.split(" ", 2) for line in python(INSTALL + TRY, json.dumps(paths)).splitlines()]
    assert {(module, name) for module, name, _ in answers} == {(m, n) for m in paths for n in paths[m]}
    for module, name, answer in answers:
        if answer != "True":
            below = module.removeprefix("tinker.")
            here = hasattr(minitinker, name) or hasattr(types, name)
            assert not here or below in LEFT_OUT_MODULES, (module, name)
            assert answer.startswith("minitinker stands in for tinker here, and "), answer


def test_all_spellings_of_a_name_give_one_class():
    print_all = """
import tinker, tinker.types as kinds
from tinker import types, TensorData
from tinker.types import TensorData as second
from tinker.types.tensor_data import TensorData as third
from tinker.lib.public_interfaces import APIFuture
from tinker.lib.public_interfaces.rest_client import RestClient
print(kinds is types is tinker.types, TensorData is second is third is tinker.types.tensor_data.TensorData)
print(TensorData is minitinker.types.TensorData)
print(isinstance(minitinker.types.TensorData([1], "int64"), tinker.TensorData))
print(APIFuture is tinker.APIFuture is minitinker.APIFuture, RestClient is tinker.RestClient)
"""
    assert python(INSTALL + print_all).split() == ["True"] * 6


def test_the_config_of_retries_is_found_where_scripts_import_it_from():
    print_all = """
from tinker.lib.retry_handler import RetryConfig, is_retryable_status_code
from tinker.lib.public_interfaces.service_client import RetryConfig as second
print(RetryConfig is second is minitinker.RetryConfig, is_retryable_status_code(429))
"""
    assert python(INSTALL + print_all).split() == ["True", "True"]


def test_a_star_brings_what_the_package_exports():
    star = "from tinker import *\nfrom tinker.types import *\n"
    star += "print(ServiceClient.__module__, SupportedModel.__module__)"
    assert python(INSTALL + star).split() == ["minitinker.service_client", "minitinker.types.training"]


def test_the_version_is_that_of_the_library_whose_names_these_are():
    assert tinker.__version__ == VERSION
    assert python(INSTALL + "import tinker; print(tinker.__version__)").strip() == VERSION


@pytest.mark.parametrize(
    ("code", "error", "why"),
    [
        (
            "from tinker import AdminClient",
            "ImportError",
            "leaves out tinker.AdminClient (accounts, their keys",
        ),
        (
            "import tinker; tinker.Timeout",
            "AttributeError",
            "leaves out tinker.Timeout (the connection to a server",
        ),
        ("import tinker.auth", "ImportError", "leaves out tinker.auth (accounts"),
        (
            "from tinker.types import AuditLogEntry",
            "ImportError",
            "leaves out tinker.types.AuditLogEntry (accounts",
        ),
        (
            "import tinker.types.audit_log_entry",
            "ImportError",
            "leaves out tinker.types.audit_log_entry (accounts",
        ),
        (
            "from tinker.lib.retry_handler import RetryHandler",
            "ImportError",
            "has no tinker.lib.retry_handler.RetryHandler",
        ),
        ("from tinker import nothing", "ImportError", "has no tinker.nothing"),
    ],
)
def test_what_is_left_out_says_so(code, error, why):
    lines = f"try:\n    {code}\nexcept {error} as error:\n    print(error)"
    assert python(INSTALL + lines).startswith(f"minitinker stands in for tinker here, and {why}")


@pytest.mark.parametrize("first", ["import tinker", "import tinker.types", "from tinker import types"])
def test_it_refuses_where_the_real_library_is_imported_already(first):
    refused = "\ntry:\n    minitinker.install_as_tinker()\nexcept ImportError as error:\n    print(error)"
    unchanged = "\nimport sys, tinker\nprint(tinker.ServiceClient.__module__, sys.meta_path == finders)"
    printed = python("import minitinker, sys\nfinders = list(sys.meta_path)\n" + first + refused + unchanged)
    assert printed.startswith(
        "the real tinker is imported already; call minitinker.install_as_tinker() before"
    )
    assert printed.splitlines()[-1] == "tinker True"


def test_doing_it_twice_changes_nothing():
    twice = """
import sys, tinker
before = list(sys.meta_path), dict(sys.modules)
minitinker.install_as_tinker()
print(before == (sys.meta_path, sys.modules))
"""
    assert python(INSTALL + twice).strip() == "True"


def test_it_touches_nothing_else():
    compare = """
import os, sys, builtins, minitinker, minitinker.types
def look():
    watched = minitinker, minitinker.types, builtins
    return [dict(sys.modules), list(sys.path), dict(os.environ), list(sys.argv), *(dict(vars(x)) for x in watched)]
before, finders = look(), list(sys.meta_path)
minitinker.install_as_tinker()
print(look() == before, sys.meta_path[1:] == finders)
import tinker
after = look()
print({name.split(".")[0] for name in after[0].keys() - before[0].keys()}, after[1:] == before[1:])
"""
    assert python(compare).splitlines() == ["True True", "{'tinker'} True"]


def test_other_libraries_find_the_stand_in():
    find = "import importlib.util as u; print(u.find_spec('tinker').origin, u.find_spec('tinker.types').name)"
    assert python(INSTALL + find).split() == ["minitinker", "tinker.types"]
