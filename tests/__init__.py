"""Tests. Triton's kernels run in its interpreter, on the CPU: it reads this when it is first imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
