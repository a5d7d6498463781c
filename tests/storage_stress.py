"""Storage under bad conditions: processes that are killed while they save, and processes side by side.

    python tests/storage_stress.py kill [KILLS]          default 300
    python tests/storage_stress.py together [SECONDS]    default 4; four processes

Each prints what it counted, and fails at the first checkpoint that is neither the old one nor the new one.
test_storage_stress.py runs both. A child is forked, not started anew, so that thousands of kills take a minute.
"""

import contextlib
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.saved_state import SavedState
from minitinker.errors import ConflictError, NotFoundError
from minitinker.model.adapter import AdapterSpec

SPEC = AdapterSpec(4, {"model.layers.0.mlp.up_proj": (600, 400), "lm_head": (500, 400)})
PATH = "tinker://run/weights/a"


def state(step: int) -> SavedState:
    """One that is known again by its step."""
    flat = np.full(SPEC.size, step, np.float32)
    return SavedState(SPEC, flat, "owner/name", step, flat + 0.25, flat + 0.5, {"step": str(step)})


def check(found: SavedState) -> int:
    """The step of a state, all of which must be of that step; its files have been held against their checksums."""
    wanted = state(found.step)
    assert found.m is not None
    assert found.v is not None
    assert np.array_equal(found.flat, wanted.flat)
    assert np.array_equal(found.m, wanted.m)
    assert np.array_equal(found.v, wanted.v)
    assert found.user_metadata == wanted.user_metadata
    return found.step


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.name != ".lock"]


# Killed while they save


def save_until_killed(root: Path, step: int, shared: mmap.mmap, linger: float) -> None:
    """Save one state over the other, and tell before and after each: (begun, done).

    linger: seconds to wait after each change of a name, so that kills fall between two of them too.
    """
    store, rename = CheckpointStore(root), os.rename

    def rename_and_linger(*names: Path) -> None:
        rename(*names)
        time.sleep(linger)

    os.rename = rename_and_linger  # type: ignore[assignment]
    while True:
        step += 1
        shared[:8] = struct.pack("q", step)
        store.save("run", "weights", "a", state(step), overwrite=True)
        shared[8:16] = struct.pack("q", step)
        if step % 3 == 0:  # other things that are done to a checkpoint, which change none of its numbers
            store.set_ttl(PATH, 1000)


def seconds_of_a_save(store: CheckpointStore) -> float:
    began = time.monotonic()
    for i in range(10):
        store.save("run", "weights", "a", state(i), overwrite=i > 0)
    store.delete(PATH)
    return (time.monotonic() - began) / 10


def kill(kills: int, seed: int = 0) -> Counter[str]:
    rng, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as home:
        root, shared = Path(home) / "storage", mmap.mmap(-1, 16)
        store, step, standing = CheckpointStore(root), 0, 0  # standing: the step of what is there; 0: nothing
        longest = min(0.1, 2 * seconds_of_a_save(store))
        for _ in range(kills):
            if rng.random() < 0.2 and standing:  # so that the first save of a name is cut off too
                store.delete(PATH)
                standing = 0
            shared[:16] = struct.pack("qq", step, standing)
            linger = rng.choice([0, longest / 6])
            child = os.fork()
            if child == 0:
                try:
                    save_until_killed(root, step, shared, linger)
                finally:
                    os._exit(1)
            time.sleep(rng.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), "the child failed"
            step, done = struct.unpack("qq", shared[:16])
            counts["kills"] += 1
            counts["that left something to sweep"] += bool(leftovers(root))
            standing = check(store.load(PATH)) if store.paths() else 0  # before anything is swept
            assert standing in (step, done), f"{standing} is there, {done} was done and {step} begun"
            if step == done:
                counts["that fell between two saves"] += 1
            else:
                which = "the new one" if standing == step else "the old one" if standing else "none"
                counts[f"in the middle of a save, that left {which}"] += 1
            store.sweep()
            assert leftovers(root) == [], leftovers(root)
            assert standing == (check(store.load(PATH)) if store.paths() else 0)
    return counts


# Side by side


def live_together(root: Path, seed: int, seconds: float) -> Counter[str]:
    """Save, overwrite, load, list, copy, change and delete what the others do the same to."""
    rng, store, counts = random.Random(seed), CheckpointStore(root), Counter[str]()
    end, own = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        name = rng.choice("abc")
        path = f"tinker://run/weights/{name}"
        calls = {
            "saved": lambda name=name: store.save("run", "weights", name, state(rng.randrange(10**6))),
            "overwritten": lambda name=name: store.save(
                "run", "weights", name, state(rng.randrange(10**6)), overwrite=True
            ),
            "loaded": lambda path=path: check(store.load(path)),
            "listed": lambda: check_entries(store),
            "deleted": lambda path=path: store.delete(path),
            "changed": lambda path=path: store.set_ttl(path, rng.choice([None, 1, 1000])),
            "copied": lambda path=path: store.delete(checked_copy(store, path)),
            "swept": lambda: store.sweep(),
        }
        done = rng.choices(list(calls), [2, 4, 6, 2, 1, 1, 1, 1])[0]
        try:
            calls[done]()
            counts[done] += 1
        except (ConflictError, NotFoundError):
            counts[f"{done}: taken or gone"] += 1
        if rng.random() < 0.2:  # what nobody else touches is never lost
            own += 1
            store.save(f"own-{seed}", "weights", "mine", state(own), overwrite=True)
            assert check(store.load(f"tinker://own-{seed}/weights/mine")) == own
    return counts


def check_entries(store: CheckpointStore) -> None:
    for entry in store.entries():
        assert entry.metadata is not None, entry


def checked_copy(store: CheckpointStore, path: str) -> str:
    copy = store.copy(path)
    check(store.load(copy))
    return copy


def together(seconds: float, processes: int = 4) -> Counter[str]:
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as home:
        root, children = Path(home) / "storage", []
        for seed in range(processes):
            out = tempfile.TemporaryFile("w+")  # noqa: SIM115
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    for what, count in live_together(root, seed, seconds).items():
                        print(count, what, file=out)
                    out.flush()
                    code = 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                os._exit(code)
            children.append((child, out))
        failed = [os.waitpid(child, 0)[1] for child, _ in children]
        assert not any(failed), f"{sum(map(bool, failed))} of {processes} processes failed"
        for _, out in children:
            out.seek(0)
            for line in out:
                count, what = line.rstrip("\n").split(" ", 1)
                counts[what] += int(count)
        store = CheckpointStore(root)
        store.sweep()
        assert leftovers(root) == [], leftovers(root)
        for path in store.paths():
            with contextlib.suppress(NotFoundError):  # it expired just now
                check(store.load(path))
    return counts


if __name__ == "__main__":
    mode, amount = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else None
    started = time.monotonic()
    counted = kill(int(amount or 300)) if mode == "kill" else together(amount or 4)
    for what, count in sorted(counted.items()):
        print(f"{count:7d}  {what}")
    print(f"{time.monotonic() - started:7.1f}  seconds")
