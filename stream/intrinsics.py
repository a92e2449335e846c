"""C functions and single machine instructions for the compiled decoder.

LZ4 and the bit transpose are the libraries' own (from the HDF5 bitshuffle filter, see ``detectors.codec``). They are
called by name, so that the compiled code can be cached on disk.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from detectors.codec import bitshuffle_library

_library = bitshuffle_library()
for _name in ("LZ4_decompress_safe", "bshuf_untrans_bit_elem"):
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_library, _name), ctypes.c_void_p).value)

lz4_decompress = types.ExternalFunction(
    "LZ4_decompress_safe", types.int32(types.voidptr, types.voidptr, types.int32, types.int32)
)
untranspose_bits = types.ExternalFunction(
    "bshuf_untrans_bit_elem", types.int64(types.voidptr, types.voidptr, types.uint64, types.uint64)
)


@intrinsic
def address(typingctx: Any, array: Any, offset: Any) -> Any:
    """The address of a byte of a uint8 array, as a C pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())

    return types.voidptr(array, types.int64), codegen


@intrinsic
def count_trailing_zeros(typingctx: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), codegen


@intrinsic
def count_ones(typingctx: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def swap_bytes(typingctx: Any, word: Any) -> Any:
    """An integer of 2, 4 or 8 bytes in the other byte order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bswap(args[0])

    return word(word), codegen
