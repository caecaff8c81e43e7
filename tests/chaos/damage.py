"""Every file of a folder changed in five ways, and what reads the folder afterwards."""

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers.commands import adapter_bytes, call

from chaos.kills import STEPS, training_flags
from chaos.lab import Lab
from jlora.config.run_config import RowConfig
from jlora.data.batch.load_dataset import load_dataset
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import JloraError
from jlora.formats.digests import fingerprint
from jlora.formats.load_params import load_params
from jlora.formats.open_model import open_model
from jlora.loading import open_adapter


def flipped(lab: Lab, file: Path) -> None:
    """Changes one bit."""
    data = bytearray(file.read_bytes())
    if data:
        data[lab.random.randrange(len(data))] ^= 1 << lab.random.randrange(8)
    file.write_bytes(data)


def truncated(lab: Lab, file: Path) -> None:
    """Leaves a part of the beginning."""
    data = file.read_bytes()
    file.write_bytes(data[: lab.random.randrange(len(data) or 1)])


def emptied(lab: Lab, file: Path) -> None:
    """Leaves nothing in the file."""
    file.write_bytes(b"")


def deleted(lab: Lab, file: Path) -> None:
    """Leaves no file."""
    file.unlink()


def replaced(lab: Lab, file: Path) -> None:
    """Puts another file in its place, of the same name or ending if there is one."""
    others = sorted(f for f in lab.copy.rglob("*") if f.is_file() and f != file)
    named = [f for f in others if f.name == file.name]
    alike = [f for f in others if f.suffix == file.suffix]
    file.write_bytes(lab.random.choice(named or alike or others).read_bytes())


DAMAGES = (flipped, truncated, emptied, deleted, replaced)
Probe = Callable[[Path], Any]


def damage_all(
    lab: Lab,
    what: str,
    folder: Path,
    probe: Probe,
    *,
    older: Any = None,
    most: int | None = None,
) -> None:
    """Damages each file in each way, in a copy of its own, and counts what `probe` finds.

    Args:
        lab: where.
        what: how the table names it.
        folder: stays as it is.
        probe: returns what the folder's reader makes of it, which must be the same as of
            the undamaged one, or raises a JloraError.
        older: what it may find as well, of the step before.
        most: so many of them, chosen at random; None: all.
    """
    copy = lab.copy
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    cases = [(name, damage) for name in names for damage in DAMAGES]
    if most is not None:
        cases = lab.random.sample(cases, most)
    shutil.copytree(folder, copy)
    expected = probe(copy)
    for name, damage in cases:
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        damage(lab, copy / name)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a warning for each
                found = probe(copy)
        except JloraError:
            outcome = "refused"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        else:
            outcome = "same result" if found == expected else "another result"
            if outcome != "same result" and older is not None and found == older:
                outcome = "older step used"
        lab.count(f"{what} {damage.__name__}", outcome, name)
    shutil.rmtree(copy)


def base_content(folder: Path) -> Any:
    """Everything that is read of a base."""
    source = open_model(str(folder))
    return (
        asdict(source.config),
        fingerprint(load_params(source)),
        Tokenizer(source.files, source.config).fingerprint,
        source.files,
    )


def adapter_content(run: Path) -> Any:
    """Everything that is read of a run's adapter."""
    adapter = open_adapter(run)
    return fingerprint(adapter.tensors), adapter.scalings, adapter.config.use_dora


def cached_content(lab: Lab, cache: Path) -> Any:
    """The batches of a data set whose token ids lie in a cache."""
    source = open_model(str(lab.folder / "hf"))
    data = load_dataset(
        lab.folder / "train.jsonl",
        Tokenizer(source.files, source.config),
        RowConfig(seq_len=64, cache_dir=str(cache)),
        vocab_size=source.config.vocab_size,
        batch_size=2,
        seed=0,
    )
    batches = (data.batch(step) for step in range(data.steps_per_epoch))
    return [{name: array.tolist() for name, array in b.items()} for b in batches]


def continued_adapter(lab: Lab, run: Path) -> bytes:
    """The adapter after one more step of a run."""
    with contextlib.chdir(lab.folder):
        done = call("train", *training_flags(run, STEPS + 1))
    if done.status in (2, 3, 4) and done.err.splitlines()[-1].startswith("error: "):
        raise JloraError(done.err)
    if done.status != 0:
        raise RuntimeError(f"exit {done.status}: {done.err[-300:]}")
    return adapter_bytes(run)
