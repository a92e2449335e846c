"""What the compiled walks over a batch read memory with.

They are given an address, not an array: counting the references to an array at every call would cost more than most of
the calls do. Numba's cache on disk watches only the file that a function is in, so this is all that the walks share.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def byte_at(typingctx: Any, address: Any, at: Any) -> Any:
    """The byte ``at`` places behind an address, as a number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(builder.add(args[0], args[1]), ir.IntType(8).as_pointer())
        return builder.zext(builder.load(place), ir.IntType(64))

    return types.int64(types.int64, types.int64), codegen
