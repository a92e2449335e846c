"""Sixteen numbers at a time: a vector of float32 for compiled (Numba) functions, with what the CPU's engine does to it.

Numba has no vectors of its own and leaves it to the optimiser to find them, which it rarely does in a matrix product or
a butterfly. These become the machine's vector instructions, of whatever width it has: one AVX-512 register, two AVX or
four NEON ones. Offsets count elements from an array's first, and nothing is checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

#: Lanes of a vector.
LANES = 16

_F32, _F64, _I32 = ir.FloatType(), ir.DoubleType(), ir.IntType(32)
_VECTOR, _WIDE = ir.VectorType(_F32, LANES), ir.VectorType(_F64, LANES)


class LanesType(types.Type):
    """Numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


lanes = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, _VECTOR)


def _address(context: Any, builder: Any, type_: Any, array: Any, offset: Any) -> Any:
    return builder.gep(context.make_array(type_)(context, builder, array).data, [offset])


def _at(builder: Any, pointer: Any, offset: int, element: Any = _F32) -> Any:
    """A vector's place ``offset`` elements behind ``pointer``."""
    vector = ir.VectorType(element, LANES)
    return builder.bitcast(builder.gep(pointer, [ir.Constant(ir.IntType(64), offset)]), vector.as_pointer())


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    wide = a.type == _WIDE
    function = builder.module.globals.get(name := f"llvm.fmuladd.v{LANES}f{64 if wide else 32}")
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


@intrinsic
def load(typingctx: Any, array: Any, offset: Any) -> Any:
    """The vector at ``offset`` of a float32 array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], *args)
        return builder.load(_at(builder, pointer, 0), align=4)

    return lanes(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Put a vector at ``offset`` of a float32 array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], _at(builder, pointer, 0), align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, lanes), codegen


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """A vector of one number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return lanes(types.float32), codegen


@intrinsic
def multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once where the machine can."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _multiply_add(builder, *args)

    return lanes(lanes, lanes, lanes), codegen


@intrinsic
def first_lanes(typingctx: Any, vector: Any, count: Any) -> Any:
    """The vector with 0 in all lanes but the first ``count``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integers = ir.VectorType(_I32, LANES)
        number = builder.trunc(args[1], _I32)
        limit = builder.insert_element(ir.Constant(integers, ir.Undefined), number, ir.Constant(_I32, 0))
        limit = builder.shuffle_vector(limit, limit, ir.Constant(integers, [0] * LANES))
        inside = builder.icmp_signed("<", ir.Constant(integers, list(range(LANES))), limit)
        return builder.select(inside, args[0], ir.Constant(_VECTOR, [0.0] * LANES))

    return lanes(lanes, types.intp), codegen


def _operation(method: str) -> Any:
    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, method)(*args)

        return lanes(lanes, lanes), codegen

    return operation


def _overload(symbol: Callable[[Any, Any], Any], method: str) -> None:
    operation = _operation(method)

    @overload(symbol)
    def typed(a: Any, b: Any) -> Any:
        if not (isinstance(a, LanesType) and isinstance(b, LanesType)):
            return None

        def implementation(a: Any, b: Any) -> Any:
            return operation(a, b)

        return implementation


_overload(operator.add, "fadd")
_overload(operator.sub, "fsub")
_overload(operator.mul, "fmul")


#: What counts come as, and how ``load_counts`` makes float32 of them.
COUNTS = ("u1", "u2", "u4", "f4", "f8")
_CONVERSIONS = (
    (ir.IntType(8), "uitofp"),
    (ir.IntType(16), "uitofp"),
    (ir.IntType(32), "uitofp"),
    (_F32, "bitcast"),
    (_F64, "fptrunc"),
)


@intrinsic
def load_counts(typingctx: Any, array: Any, offset: Any, kind: Any) -> Any:
    """The 16 numbers of type ``COUNTS[kind]`` at a byte offset of a uint8 array, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(context, builder, signature.args[0], *args[:2])
        blocks = [builder.append_basic_block(name) for name in COUNTS]
        after = builder.append_basic_block("converted")
        switch = builder.switch(args[2], blocks[0])
        vectors = []
        for number, (block, (element, convert)) in enumerate(zip(blocks, _CONVERSIONS, strict=True)):
            switch.add_case(ir.Constant(ir.IntType(64), number), block)
            builder.position_at_end(block)
            pointer = builder.bitcast(place, ir.VectorType(element, LANES).as_pointer())
            vectors.append(getattr(builder, convert)(builder.load(pointer, align=1), _VECTOR))
            builder.branch(after)
        builder.position_at_end(after)
        result = builder.phi(_VECTOR)
        for vector, block in zip(vectors, blocks, strict=True):
            result.add_incoming(vector, block)
        return result

    return lanes(array, types.intp, types.intp), codegen


@intrinsic
def store_transposed(typingctx: Any, square: Any, array: Any, offset: Any, stride: Any) -> Any:
    """Put columns 2 i and 2 i + 1 of a (16, 16) float32 array at ``offset + i * stride`` of another, side by side."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = _address(context, builder, signature.args[0], args[0], ir.Constant(ir.IntType(64), 0))
        rows = [builder.load(_at(builder, source, i * LANES), align=4) for i in range(LANES)]
        half = LANES // 2
        mask = ir.VectorType(_I32, LANES)
        low = ir.Constant(mask, [i // 2 + LANES * (i % 2) for i in range(LANES)])
        high = ir.Constant(mask, [half + i // 2 + LANES * (i % 2) for i in range(LANES)])
        # Interleaving the first half of the rows with the second, like a pack of cards, four times over.
        for _ in range(4):
            rows = [builder.shuffle_vector(rows[i], rows[i + half], part) for i in range(half) for part in (low, high)]
        for j, row in enumerate(rows):
            place = builder.add(args[2], builder.mul(args[3], ir.Constant(ir.IntType(64), j // 2)))
            pointer = _address(context, builder, signature.args[1], args[1], place)
            builder.store(row, _at(builder, pointer, j % 2 * LANES), align=4)
        return context.get_dummy_value()

    return types.none(square, array, types.intp, types.intp), codegen


@intrinsic
def turned_sum(typingctx: Any, real: Any, imag: Any, turns: Any, offset: Any) -> Any:
    """The sum over lanes of (real + i imag) (c + i s) in double precision, as (real, imaginary) part.

    ``turns`` float64 holds the 16 c, then the 16 s, at ``offset``.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[2], args[2], args[3])
        c, s = (builder.load(_at(builder, pointer, part * LANES, _F64), align=8) for part in range(2))
        re, im = (builder.fpext(part, _WIDE) for part in args[:2])
        minus = builder.fsub(ir.Constant(_WIDE, [-0.0] * LANES), builder.fmul(im, s))
        products = _multiply_add(builder, re, c, minus), _multiply_add(builder, re, s, builder.fmul(im, c))
        sums = []
        for part in products:
            width = LANES
            while width > 1:
                width //= 2
                mask = ir.VectorType(_I32, width)
                halves = (
                    builder.shuffle_vector(part, part, ir.Constant(mask, list(range(first, first + width))))
                    for first in (0, width)
                )
                part = builder.fadd(*halves)
            sums.append(builder.extract_element(part, ir.Constant(_I32, 0)))
        return context.make_tuple(builder, signature.return_type, sums)

    return types.UniTuple(types.float64, 2)(lanes, lanes, turns, types.intp), codegen


@intrinsic
def take_part(typingctx: Any, counter: Any) -> Any:
    """The next number of a counter (int64 array of one) that threads share, counting from 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], ir.Constant(ir.IntType(64), 0))
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


def _dense_tile(count: int) -> Any:
    @intrinsic
    def tile(
        typingctx: Any, weights: Any, first: Any, stride: Any, spectra: Any, start: Any, length: Any, out: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            int64 = ir.IntType(64)
            _, first, stride, _, start, length, _ = args
            numbers = builder.bitcast(
                context.make_array(signature.args[0])(context, builder, args[0]).data, _F32.as_pointer()
            )
            spectrum = _address(context, builder, signature.args[3], args[3], start)
            target = _address(context, builder, signature.args[6], args[6], ir.Constant(int64, 0))
            two = ir.Constant(int64, 2)
            begins = [
                builder.gep(numbers, [builder.mul(two, builder.mul(builder.add(first, ir.Constant(int64, j)), stride))])
                for j in range(count)
            ]
            before = builder.block
            loop, after = builder.append_basic_block("pixels"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(int64)
            k.add_incoming(ir.Constant(int64, 0), before)
            sums = []
            for _ in range(2 * count):
                phi = builder.phi(_VECTOR)
                phi.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
                sums.append(phi)
            here = builder.gep(spectrum, [builder.mul(k, ir.Constant(int64, 2 * LANES))])
            re, im = (builder.load(_at(builder, here, part * LANES), align=4) for part in range(2))
            minus = builder.fneg(im)
            at = builder.mul(two, k)
            results = []
            for j in range(count):
                place = builder.gep(begins[j], [at])
                t_re = _splat(builder, builder.load(place, align=4))
                t_im = _splat(builder, builder.load(builder.gep(place, [ir.Constant(int64, 1)]), align=4))
                results.append(_multiply_add(builder, t_im, minus, _multiply_add(builder, t_re, re, sums[2 * j])))
                results.append(_multiply_add(builder, t_im, re, _multiply_add(builder, t_re, im, sums[2 * j + 1])))
            following = builder.add(k, ir.Constant(int64, 1))
            k.add_incoming(following, loop)
            for phi, result in zip(sums, results, strict=True):
                phi.add_incoming(result, loop)
            builder.cbranch(builder.icmp_signed("<", following, length), loop, after)
            builder.position_at_end(after)
            for j, result in enumerate(results):
                builder.store(result, _at(builder, target, j * LANES), align=4)
            return context.get_dummy_value()

        signature = types.none(weights, types.intp, types.intp, spectra, types.intp, types.intp, out)
        return signature, codegen

    return tile


#: Entries of a tile.
TILE = 12

#: (weights complex64, first entry, K, spectra, offset, K, out): the products of 12 (or 1) kernels with one spectrum
dense_tile, dense_row = _dense_tile(TILE), _dense_tile(1)
