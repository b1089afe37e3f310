"""`python -m tests.helpers.interpreted ...`: the command `stllm` with Triton's interpreter, which needs no GPU.

The interpreter lacks two things that Liger uses: functions of CUDA's libdevice, and floats as scalars of a kernel.
"""

import os
import sys
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    libdevice.rsqrt = lambda x: tl.math.rsqrt(x)
    libdevice.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        """Convert a kernel's argument to the interpreter's scalar."""
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = converted
    from stllm.cli import main

    sys.exit(main(sys.argv[1:]))
