"""What the package is, stands in pyproject.toml. This file is for those who want the kernels compiled beforehand:

    MINIVLM_BUILD=1 pip install --no-build-isolation .

Without that, installing compiles nothing and needs no torch, and the kernels are compiled at first use, as
minivlm/ops/build.py says: then for the very processor they run on, here for every processor of its kind.
"""

import os
import runpy

from setuptools import setup


def kernels() -> dict:
    from torch.utils import cpp_extension

    build = runpy.run_path("minivlm/ops/build.py")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build["architectures"]())
    kind = cpp_extension.CUDAExtension if build["with_cuda"]() else cpp_extension.CppExtension
    extension = kind(
        f"minivlm.ops.{build['ahead_of_time_name']()}",
        [os.path.relpath(source) for source in build["sources"]("minivlm")],
        extra_compile_args={"cxx": build["flags"]("minivlm", native=False), "nvcc": ["-O3"]},
    )
    # No init function for Python: torch.ops.load_library is what loads it.
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**(kernels() if os.environ.get("MINIVLM_BUILD") else {}))
