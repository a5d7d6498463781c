"""Run a script that was written for the hosted service's library, unchanged, on this machine.

    python -m minitinker.run SCRIPT [ARGS]
    python -m minitinker.run -m MODULE [ARGS]

is `python SCRIPT [ARGS]` or `python -m MODULE [ARGS]` with `minitinker.install_as_tinker()` done first. That holds
for this process and those forked from it; one that the script starts anew has to be started so as well.
"""

import importlib.util
import os
import sys
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import NoReturn

from minitinker import install_as_tinker


def main(arguments: list[str]) -> None:
    """Run what the arguments say, in the module __main__; it may raise SystemExit or anything else."""
    match arguments:
        case ["-h" | "--help"]:
            print(__doc__)
        case ["-m", name, *rest]:
            install_as_tinker()
            run_module(name, rest)
        case [script, *rest] if not script.startswith("-"):
            install_as_tinker()
            run_script(script, rest)
        case _:
            leave("give a script, or -m and a module; see python -m minitinker.run --help", 2)


def run_script(script: str, arguments: list[str]) -> None:
    """What `python script arguments` does."""
    path = os.path.abspath(script)
    if not os.path.isfile(path):
        leave(f"can't open {path!r}: there is no such file", 2)
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    run(SourceFileLoader("__main__", path), path, None)


def run_module(name: str, arguments: list[str]) -> None:
    """What `python -m name arguments` does. The folder it starts in is the first of sys.path already."""
    spec = find_module(name)
    if spec and spec.submodule_search_locations is not None:
        spec = find_module(f"{name}.__main__")
    if spec is None or not isinstance(spec.loader, InspectLoader) or spec.origin is None:
        leave(f"there is no module {name} that can be run", 1)
    sys.argv = [spec.origin, *arguments]
    run(spec.loader, spec.origin, spec)


def find_module(name: str) -> ModuleSpec | None:
    """Its spec; None where it, or a package that it should be in, is not there."""
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def run(loader: InspectLoader, path: str, spec: ModuleSpec | None) -> None:
    """Run code as the module __main__ of this process. spec: of a module; None for a script."""
    module = ModuleType("__main__")
    module.__spec__ = spec
    module.__loader__ = loader
    module.__package__ = spec.parent if spec else None
    vars(module).update(
        __annotations__={}, __file__=path, __cached__=spec.cached if spec else None, __builtins__=__builtins__
    )
    code = loader.get_code(spec.name if spec else "__main__")
    sys.modules["__main__"] = module
    if code is not None:
        exec(code, vars(module))


def leave(why: str, status: int) -> NoReturn:
    """End the program with a message, as Python does where it cannot begin."""
    print(f"minitinker.run: {why}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
