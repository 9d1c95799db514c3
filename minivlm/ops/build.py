"""Compiles csrc/ and loads it: built ahead of time by setup.py, or earlier, or now, once per machine.

Two libraries come out of the same sources: `minivlm`, the C++ kernels and, where torch and a toolkit allow, the CUDA
kernels; and `minivlm_emulated`, the CUDA kernels compiled for the CPU. What goes wrong becomes one line, `Unavailable`;
every op has a reference to fall back on.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

LIBRARIES = ("minivlm", "minivlm_emulated")
LOCK_SECONDS = 300  # to wait for another process that builds the same thing, before going on without kernels
_HERE = Path(__file__).resolve().parent
# In a checkout csrc/ stands beside the package, in an installed package inside it.
CSRC = next((folder for folder in (_HERE.parents[1] / "csrc", _HERE.parent / "csrc") if folder.is_dir()), None)


class Unavailable(Exception):
    """Why a library cannot be had here, in a line."""


def load(library: str) -> None:
    """Load one of `LIBRARIES` into torch, building it if need be; raises `Unavailable` with the reason."""
    ready = find(library)
    torch.ops.load_library(ready if ready else _build(library))


def find(library: str) -> Path | None:
    """The compiled library, if it is there: the one that setup.py left beside this file, or an earlier build's."""
    if CSRC is None:
        return next(iter(_HERE.glob("_kernels_*.so")), None) if library == "minivlm" else None
    for ahead in _HERE.glob(f"{ahead_of_time_name()}*.so") if library == "minivlm" else []:
        return ahead
    built = folder(library) / f"{library}.so"
    return built if built.is_file() else None


def with_cuda() -> bool:
    """Whether CUDA kernels can be compiled: a matter of torch and the toolkit. A visible GPU is not asked for."""
    return torch.version.cuda is not None and nvcc() is not None


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def ninja() -> str | None:
    """On the PATH, or beside this Python: a virtual environment need not be activated to be used."""
    return shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)


def architectures() -> str:
    """What nvcc compiles for: the environment's wish, else this machine's GPU, else A100, H100, PTX for later ones."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    if torch.cuda.is_available():
        return "{}.{}+PTX".format(*torch.cuda.get_device_capability())
    return "8.0;9.0+PTX"


def sources(library: str) -> list[str]:
    if library == "minivlm_emulated":
        patterns = ["emulate/*.cpp"]
    else:
        patterns = ["cpu/*.cpp"] + (["cuda/*.cpp", "cuda/*.cu"] if with_cuda() else [])
    return [str(path) for pattern in patterns for path in sorted(CSRC.glob(pattern))]


def flags(library: str, native: bool) -> list[str]:
    """For the C++ compiler. `native` allows all instructions of this machine: right for a build that stays here."""
    # omp simd lets sums be vectorised; hidden visibility keeps the two libraries' kernels of the same name apart.
    common = ["-O3", "-fopenmp-simd", "-fvisibility=hidden"]
    if library == "minivlm_emulated":
        return [*common, f"-I{CSRC / 'emulate'}"]
    if not native:
        return common
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return common + (["-march=native", "-mprefer-vector-width=512"] if is_x86 else ["-mcpu=native"])


def folder(library: str) -> Path:
    """Where builds of exactly these sources for exactly this torch, toolkit and processor live."""
    try:
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    except RuntimeError as error:  # a container may run as a user that it has no entry for
        raise Unavailable("this user has no home folder to build in: set TORCH_EXTENSIONS_DIR") from error
    parts = [_sources_hash(library), torch.__version__, compiler() or "", _processor(), *flags(library, native=True)]
    if with_cuda():
        parts += [str(torch.version.cuda), architectures()]
    return Path(root) / f"{library}-{_short_hash(parts)}"


def ahead_of_time_name() -> str:
    """The module that setup.py builds. The hash makes a stale one, of older sources or another torch, invisible."""
    return f"_kernels_{_short_hash([_sources_hash(LIBRARIES[0]), torch.__version__, str(torch.version.cuda)])}"


def _build(library: str) -> Path:
    if os.name != "posix":
        raise Unavailable("kernels are built on Linux and macOS only")
    if CSRC is None:
        raise Unavailable("the C++ sources were not installed")
    if compiler() is None:
        raise Unavailable("no C++ compiler (looked for $CXX, then c++)")
    if ninja() is None:
        raise Unavailable("ninja is missing (pip install ninja)")
    place = folder(library)
    log = place.with_suffix(".log")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _lock(place.with_suffix(".lock")):
            if log.is_file():
                raise Unavailable(f"compiling failed before, see {log} (delete it to try again)")
            if not place.is_dir():
                _compile(library, place, log)
    except OSError as error:
        raise Unavailable(f"cannot build in {place.parent}: {error}") from error
    return place / f"{library}.so"


def _compile(library: str, place: Path, log: Path) -> None:
    """Build beside `place`, then rename: whoever finds `place` finds it whole."""
    print(f"minivlm: compiling kernels into {place}, once; this takes a while ...", file=sys.stderr, flush=True)
    from torch.utils import cpp_extension  # a third of a second, wanted only here

    started = time.monotonic()
    scratch = place.with_suffix(".building")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    # Without a list and without a GPU, torch stops with an IndexError.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
    cflags = flags(library, native=True)
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{path}{os.pathsep}{Path(ninja()).parent}"  # where torch looks for it
    try:
        cpp_extension.load(library, sources(library), cflags, build_directory=str(scratch), is_python_module=False)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        log.write_text(str(error))
        raise Unavailable(f"compiling failed, see {log}") from error
    finally:
        os.environ["PATH"] = path
    scratch.rename(place)
    print(f"minivlm: kernels ready after {time.monotonic() - started:.0f} s", file=sys.stderr)


@contextmanager
def _lock(path: Path):
    """One builder at a time. The system takes the lock from a process that dies, so that it cannot go stale."""
    import fcntl  # not there on Windows

    with path.open("w") as file:
        deadline, waiting = time.monotonic() + LOCK_SECONDS, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            if time.monotonic() > deadline:
                raise Unavailable(f"another process has been compiling for {LOCK_SECONDS} s, holding {path}")
            if not waiting:
                print(f"minivlm: another process compiles the kernels, waiting for {path}", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(0.1)
        yield


def _sources_hash(library: str) -> str:
    """Of the sources and of every header they could include."""
    folders = {Path(source).parent for source in sources(library)} | {CSRC}
    folders |= {CSRC / "cuda"} if library == "minivlm_emulated" else set()
    headers = [path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh", ".cu")]
    files = sorted({*headers, *map(Path, sources(library))})
    return _short_hash([f"{path.relative_to(CSRC)}\n{path.read_text()}" for path in files])


def _processor() -> str:
    """What `-march=native` depends on: home folders are shared between machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.platform())


def _short_hash(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
