"""How ops choose a backend and what torch knows about them: compile, opcheck, builds that fail, locks that are held."""

import fcntl
import os
import shutil
import subprocess
import sys

import pytest
import torch
from ops_helpers import backends, kernels, library, on, randn
from torch.utils import cpp_extension

from minivlm import ops
from minivlm.cache import KVCache
from minivlm.decoder import Decoder, DecoderConfig
from minivlm.errors import MinivlmError
from minivlm.ops import backend as choice
from minivlm.ops import build


def block(x, residual, weight, positions, inv_freq):
    """The ops as a decoder layer calls them."""
    normed, residual = ops.add_rms_norm(residual, x, weight, 1e-6)
    q = ops.rms_norm(normed.view(2, 3, 4, 16), weight[:16], 1e-6)
    q, k = ops.apply_rope(q, q[:, :, :2], positions, inv_freq, [2, 3, 3], 1.25)
    return q.flatten(2) + residual, k


def block_inputs():
    leaves = [randn(2, 3, 64, seed=0), randn(2, 3, 64, seed=1), randn(64, seed=2)]
    return [x.requires_grad_() for x in leaves] + [torch.arange(18).view(3, 2, 3), randn(8, seed=3).abs()]


@backends
def test_ops_compile_without_a_break(backend):
    with on(backend):
        torch.compiler.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")  # the whole path but code generation
        ours, theirs = block_inputs(), block_inputs()
        for mine, exact in zip(compiled(*ours), block(*theirs), strict=True):
            torch.testing.assert_close(mine, exact)
        (compiled(*ours)[0] ** 2).sum().backward(), (block(*theirs)[0] ** 2).sum().backward()
        for mine, exact in zip(ours[:3], theirs[:3], strict=True):
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, exact.grad)


@kernels
@pytest.mark.parametrize("sections", [None, (2, 3, 3)])
def test_decoder_logits_are_the_references(backend, sections):
    """The same tokens through prompt and cache, with kernels and without."""
    config = DecoderConfig.from_hf(
        {
            "model_type": "qwen2", "vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rope_scaling": sections and {"type": "mrope", "mrope_section": sections},
        }
    )  # fmt: skip
    ids = torch.arange(14, device="cpu").view(2, 7)

    def logits():
        torch.manual_seed(0)
        with torch.device("cpu"):
            decoder = Decoder(config)
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        decoder.to(torch.get_default_device())
        tokens, cache = ids.to(torch.get_default_device()), KVCache(config.num_layers)
        positions = None if sections is None else torch.stack([torch.arange(7).expand(2, 7) * i for i in (1, 2, 3)])
        prompt = decoder(decoder.embed_tokens(tokens), torch.ones_like(tokens), positions, cache)
        return torch.cat((prompt, decoder.decode(tokens[:, :1], cache)[:, None]), 1)

    with on(backend), torch.inference_mode():
        ours = logits()
        with ops.use("reference"):
            theirs = logits()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@kernels
def test_patch_merge_compiles_without_a_break(backend):
    with on(backend):
        torch.compiler.reset()
        compiled = torch.compile(ops.patch_merge, fullgraph=True, backend="aot_eager")
        arguments = randn(8, 5), torch.tensor([[1, 2, 4]]), 2, randn(5), randn(5), 1e-6
        torch.testing.assert_close(compiled(*arguments), ops.patch_merge(*arguments))


@kernels
def test_patchify_compiles_without_a_break(backend):
    with on(backend):
        torch.compiler.reset()
        compiled = torch.compile(ops.patchify, fullgraph=True, backend="aot_eager")
        arguments = torch.arange(144, dtype=torch.uint8).view(3, 4, 4, 3), randn(3, 256), 2, 2
        assert torch.equal(compiled(*arguments), ops.patchify(*arguments))


@kernels
def test_compiled_code_follows_the_choice_of_backend(backend):
    """A graph traced with kernels must not be replayed when the reference is asked for."""
    seen = []

    def watch(graph, _):
        seen.append("minivlm" in graph.code)
        return graph

    with on(backend):
        torch.compiler.reset()
        compiled = torch.compile(lambda x: ops.rms_norm(x, x[0], 1e-6), backend=watch)
        compiled(randn(2, 8))
        with ops.use("reference"):
            compiled(randn(2, 8))
    assert seen == [True, False]


@kernels
def test_ops_pass_opcheck(backend):
    with on(backend):
        op = library(backend)
        x, weight, q, k = randn(3, 8), randn(8), randn(2, 3, 4, 8), randn(2, 3, 2, 8)
        for leaf in (x, weight, q, k):
            leaf.requires_grad_()
        grids, positions = torch.tensor([[1, 2, 4]]), torch.arange(6).view(2, 3)
        torch.library.opcheck(op.rms_norm, (x, weight, 1e-6))
        torch.library.opcheck(op.add_rms_norm, (x, x.detach(), weight, 1e-6))
        torch.library.opcheck(op.apply_rope, (q, k, positions, randn(4), None, 1.5))
        torch.library.opcheck(op.apply_rope, (q, k, positions.expand(2, 2, 3), randn(4), [1, 3]))
        torch.library.opcheck(op.patch_merge, (randn(8, 8).requires_grad_(), grids, 2, weight, weight.detach(), 1e-6))
        x, weight = x.detach(), weight.detach()
        torch.library.opcheck(op.rms_norm_backward, (x, None, x, weight, 1e-6))
        torch.library.opcheck(op.rms_norm_backward, (x, x, x, weight, 1e-6))
        torch.library.opcheck(op.patch_merge_backward, (randn(2, 32), randn(8, 8), grids, 2, weight, 1e-6))
        torch.library.opcheck(op.patchify, (torch.ones(3, 4, 6, 3, dtype=torch.uint8), randn(3, 256), 2, 2))


def test_meta_tensors_have_shapes_and_no_backend():
    x, inv_freq = torch.empty(2, 3, 4, 8, device="meta"), torch.empty(4, device="meta")
    with on("cpu"):
        q, k = ops.apply_rope(x, x[:, :, :1], torch.empty(2, 3, dtype=torch.int64, device="meta"), inv_freq)
        assert q.shape == (2, 3, 4, 8) and k.shape == (2, 3, 1, 8) and q.is_meta
        assert ops.rms_norm(x, x[0, 0, 0], 1e-6).shape == x.shape


def test_reference_is_always_there_and_names_are_checked():
    assert ops.backends()[0] == "reference"
    with pytest.raises(MinivlmError, match="no kernel backend 'fast'.*auto"):
        ops.set_backend("fast")
    before = choice._mode
    with pytest.raises(ZeroDivisionError), ops.use("reference"):
        1 / 0  # noqa: B018
    assert choice._mode == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_forced_backend_that_is_not_there_is_an_error():
    with pytest.raises(MinivlmError, match="cuda kernels are not there"):
        ops.set_backend("cuda")


def run(code, **environment):
    """A fresh process: what it prints to stdout, and to stderr."""
    environment = {**os.environ, "MINIVLM_KERNELS": "auto", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


USE = "import torch; from minivlm import ops; print(ops.rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum().item())"
FORCE = "from minivlm import ops, errors\ntry: ops.set_backend('fused')\nexcept errors.MinivlmError as e: print(e)"


def test_without_a_compiler_the_reference_runs_and_one_line_says_so(tmp_path):
    nowhere = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    out, err = run(USE, **nowhere)
    assert out == "8.0\n" and err.count("\n") == 1 and "no C++ compiler" in err
    assert "no C++ compiler" in run(FORCE, **nowhere)[0]
    assert run(USE, **nowhere, MINIVLM_KERNELS="reference") == ("8.0\n", "")  # asked for, so nothing to say
    asked = USE.replace("; print", "\ntry: print") + "\nexcept Exception as error: print(error)"
    assert "no C++ compiler" in run(asked, **nowhere, MINIVLM_KERNELS="fused")[0]  # and not the reference in silence


def test_without_ninja_the_reference_runs_and_one_line_says_so(tmp_path):
    (tmp_path / "c++").symlink_to("/bin/true")
    elsewhere = f"import sys; sys.executable = {str(tmp_path / 'python')!r}; "
    out, err = run(elsewhere + USE, TORCH_EXTENSIONS_DIR=str(tmp_path), PATH=str(tmp_path), CXX="c++")
    assert out == "8.0\n" and err.count("\n") == 1 and "ninja is missing" in err


def test_ninja_is_found_beside_a_python_that_is_not_on_the_path(tmp_path, monkeypatch):
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.symlink_to("/bin/true")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    for name, value in {"TORCH_EXTENSIONS_DIR": tmp_path, "CXX": "/bin/true", "PATH": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    seen = []
    monkeypatch.setattr(cpp_extension, "load", lambda *_, **__: seen.append(shutil.which("ninja")))
    build._build("minivlm")
    assert seen == [str(ninja)] and os.environ["PATH"] == str(tmp_path)


def test_a_compiler_that_fails_is_not_asked_twice(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho this compiler is broken >&2; exit 1\n")
    broken.chmod(0o755)
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "builds"), "CXX": str(broken)}
    out, err = run(USE, **environment)
    assert out == "8.0\n" and "compiling failed, see" in err.splitlines()[-1] and "Traceback" not in err
    log = next((tmp_path / "builds").glob("*.log"))
    assert "this compiler is broken" in log.read_text()
    out, err = run(USE, **environment)
    assert out == "8.0\n" and err.count("\n") == 1 and "failed before" in err


def test_a_lock_that_is_held_does_not_hang(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "LOCK_SECONDS", 0.3)
    path = build.folder("minivlm").with_suffix(".lock")
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(build.Unavailable, match=str(path)):
            build._build("minivlm")
    assert "another process" in capsys.readouterr().err


def test_a_folder_nobody_may_write_is_a_reason_and_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(build.Unavailable, match="cannot build in"):
        build._build("minivlm")


def test_a_user_without_a_home_gets_the_references():
    nobody = "import os, pwd; del os.environ['HOME']; pwd.getpwuid = lambda _: {}['nobody']; "
    out, err = run(nobody + USE, TORCH_EXTENSIONS_DIR="")
    assert out == "8.0\n" and err.count("\n") == 1 and "set TORCH_EXTENSIONS_DIR" in err


def test_builds_of_other_sources_or_compilers_live_in_other_folders(tmp_path, monkeypatch):
    before = build.folder("minivlm")
    monkeypatch.setenv("CXX", "/usr/bin/env")
    assert build.folder("minivlm") != before
    monkeypatch.undo()
    (tmp_path / "other.h").write_text("")
    monkeypatch.setattr(build, "CSRC", tmp_path)
    assert build.folder("minivlm") != before


def test_a_library_built_ahead_of_time_is_found_unless_it_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_HERE", tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "_kernels_0123456789ab.cpython-311.so").touch()
    assert build.find("minivlm") is None
    (tmp_path / f"{build.ahead_of_time_name()}.cpython-311.so").touch()
    assert build.find("minivlm").name.startswith(build.ahead_of_time_name())


def test_the_doctor_checks_itself():
    done = subprocess.run([sys.executable, "-m", "minivlm.ops"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "C++ compiler" in done.stdout and "WRONG" not in done.stdout
    assert all(f"self-check       {name}" in done.stdout for name in ops.backends()[1:])


def test_importing_ops_compiles_and_imports_nothing_heavy():
    heavy = "torch._dynamo", "torch.utils.cpp_extension", "setuptools", "transformers"
    out, err = run(f"import sys, minivlm.ops; print([name for name in {heavy} if name in sys.modules])")
    assert (out, err) == ("[]\n", "")
