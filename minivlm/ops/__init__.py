"""The hand-written kernels: one op per file, each with the five lines of torch that define it.

    from minivlm import ops
    y = ops.rms_norm(x, weight, eps)
    with ops.use("reference"):          # force a backend; see ops.backends() for what is there
        ...

Needs torch and nothing else. `python -m minivlm.ops` says which backend each op would use here, and why.
"""

from minivlm.ops.backend import backends, set_backend, use
from minivlm.ops.patch_merge import patch_merge
from minivlm.ops.patchify import patchify
from minivlm.ops.rms_norm import add_rms_norm, rms_norm
from minivlm.ops.rope import apply_rope

__all__ = ["add_rms_norm", "apply_rope", "backends", "patch_merge", "patchify", "rms_norm", "set_backend", "use"]
