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
from numba.core import cgutils
from numba.extending import intrinsic

from detectors.codec import bitshuffle_library


def add_symbols(library: ctypes.CDLL, *names: str) -> None:
    """Make C functions known to the compiler by name. Raises ``AttributeError``, and adds none, where one is hidden."""
    addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
    for name, where in zip(names, addresses, strict=True):
        llvmlite.binding.add_symbol(name, where)


def add_loaded_symbols(extension: str, *names: str) -> bool:
    """The same for the library that an extension module (its file) was linked with; False where they are hidden."""
    try:
        # Loaded already: this handle finds the symbols of the libraries that it was linked with, too.
        add_symbols(ctypes.CDLL(extension), *names)
    except (OSError, AttributeError):
        return False
    return True


add_symbols(bitshuffle_library(), "LZ4_decompress_safe", "bshuf_untrans_bit_elem")

lz4_decompress = types.ExternalFunction(
    "LZ4_decompress_safe", types.int32(types.voidptr, types.voidptr, types.int32, types.int32)
)
untranspose_bits = types.ExternalFunction(
    "bshuf_untrans_bit_elem", types.int64(types.voidptr, types.voidptr, types.uint64, types.uint64)
)


@intrinsic
def address(typingctx: Any, array: Any, index: Any) -> Any:
    """The address of an element of a contiguous array, as a C pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())

    return types.voidptr(array, types.int64), codegen


@intrinsic
def copy_bytes(typingctx: Any, to: Any, source: Any, count: Any) -> Any:
    """C's memcpy: a slice's assignment goes byte by byte."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.raw_memcpy(builder, args[0], args[1], args[2], 1)
        return context.get_dummy_value()

    return types.void(types.voidptr, types.voidptr, types.int64), codegen


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


@intrinsic
def byte_at(typingctx: Any, array: Any, offset: Any) -> Any:
    """A byte of a uint8 array, as int64. Nothing is checked, and no offset counts from the end."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.zext(builder.load(builder.gep(data, [args[1]])), ir.IntType(64))

    return types.int64(array, types.int64), codegen


@intrinsic
def word_at(typingctx: Any, array: Any, offset: Any) -> Any:
    """Eight bytes of a uint8 array as uint64, the first byte lowest on a little-endian machine; nothing is checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        word = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(64).as_pointer())
        return builder.load(word, align=1)

    return types.uint64(array, types.int64), codegen


def _copy_exactly(size: int) -> Any:
    @intrinsic
    def copy(typingctx: Any, to: Any, to_offset: Any, source: Any, source_offset: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = ir.VectorType(ir.IntType(8), size).as_pointer()
            to_data = context.make_array(signature.args[0])(context, builder, args[0]).data
            source_data = context.make_array(signature.args[2])(context, builder, args[2]).data
            value = builder.load(builder.bitcast(builder.gep(source_data, [args[3]]), pointer), align=1)
            builder.store(value, builder.bitcast(builder.gep(to_data, [args[1]]), pointer), align=1)
            return context.get_dummy_value()

        return types.void(to, types.int64, source, types.int64), codegen

    return copy


#: Copy 8 or 16 bytes of a uint8 array (its offset) to another or the same (offset), all of them read before any is
#: written; nothing is checked.
copy_8, copy_16 = _copy_exactly(8), _copy_exactly(16)


@intrinsic
def clear_bytes(typingctx: Any, array: Any, offset: Any, count: Any) -> Any:
    """C's memset of a uint8 array to 0, from an offset."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        cgutils.memset(builder, builder.gep(data, [args[1]]), args[2], 0)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen
