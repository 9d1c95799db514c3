"""What `ptxas -v` says about each kernel: prints registers and shared memory, fails on a spill or a stack frame."""

import re
import subprocess
import sys

source, architecture = sys.argv[1:]
report = sys.stdin.read()
kernels = re.findall(
    r"properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (\d+) registers(?:.*?(\d+) bytes smem)?",
    report,
)
if not kernels:
    sys.exit(f"{source}: no kernel in the report of ptxas:\n{report}")
names = subprocess.run(["c++filt"], input="\n".join(kernel[0] for kernel in kernels), capture_output=True, text=True)
bad = 0
for name, (_, stack, stores, loads, registers, shared) in zip(names.stdout.splitlines(), kernels, strict=True):
    name = re.sub(r"\(anonymous namespace\)::|minivlm::cuda::|void |\(.*", "", name)
    print(f"{architecture}  {registers:>3} registers  {shared or 0:>5} bytes shared  {name}")
    bad += int(stack) + int(stores) + int(loads)
if bad:
    sys.exit(f"{source}: {bad} bytes of stack and spills for {architecture}; none are allowed")
