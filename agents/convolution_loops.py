"""Convolutions of images in compiled loops, forward and backward, without copying patches.

A convolution is many small products: the numbers under the kernel, times its weights, for each
pixel put out. They are added up by `_tile_of`, which holds the sums of up to twelve pixels and two
registers of channels while it walks over patches where they lie: rows of a patch are runs in
memory. The gradients by weights and by inputs are sums of the same form over other strides.
Measured for 16 images on one AVX-512 core, through the convolutions of the Nature CNN: 1.4 ms
forward and 2.1 ms backward, oneDNN with torch's scaling of pixels and ReLUs 2.4 and 3.1 ms. Before
a BLAS, laying out patches costs another 0.4 of its products' time.

Images lie as `[height, width, channels]`, the pixels that are seen as `[height, channels, width]`,
each image by itself. Kernels lie as patches do, `[taps, n_out]`. Everything is flat, and a table
says for each convolution (int64 `[L, 11]`): channels, height, width of its inputs; channels out,
kernel, stride; height and width out; where in their memories its weights and biases, its turned
weights, and its outputs begin, the latter for one image. `ready` says whether this can be used.
"""

from __future__ import annotations

from platform import machine
from typing import Any

from perennial.plasticity import kernels

try:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils, config
    from numba.core.codegen import get_host_cpu_features
    from numba.extending import intrinsic
except ImportError:  # pragma: no cover - no wheel for this Python yet
    ready = False
else:
    ready = kernels.numba is not None


def _compiles_for(feature: str) -> bool:
    """Whether numba compiles for an x86 processor that has this."""
    asked = config.CPU_FEATURES  # type: ignore[attr-defined]
    return f"+{feature}" in (get_host_cpu_features() if asked is None else asked)


# Processors without fused multiply-add, x86 of before 2013, would call a function for each.
ready = ready and (machine().lower() not in ("x86_64", "amd64") or _compiles_for("fma"))
_WIDE = ready and _compiles_for("avx512f")  # 32 registers of 64 bytes
_REGISTER = 64 if _WIDE else 32  # bytes of a vector
_MOST = 12 if _WIDE else 6  # sums of two registers each that leave some for the factors


def _tile_of(registers: int) -> Any:
    """`tile(rows, a, from_a, row_a, outer_a, inner_a, outer, inner, b, from_b, outer_b, inner_b,
    out, from_out, row_out)`, for compiled loops:

        out[from_out + r * row_out + c] += sum over i < outer, j < inner of
            a[from_a + r * row_a + i * outer_a + j * inner_a]
            * b[from_b + i * outer_b + j * inner_b + c]

    for 1 <= r <= rows, at most `_MOST`, and as many c as fit into so many registers. LLVM would not
    keep such sums in registers if these were loops over arrays.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        rows, a, from_a, row_a, outer_a, inner_a, outer, inner = values[:8]
        b, from_b, outer_b, inner_b, out, from_out, row_out = values[8:]
        number = context.get_data_type(signature.args[1].dtype)
        size = context.get_abi_sizeof(number)
        lanes = registers * _REGISTER // size
        vector, index = ir.VectorType(number, lanes), ir.IntType(64)
        name = f"llvm.fma.v{lanes}f{8 * size}"
        kind = ir.FunctionType(vector, [vector] * 3)
        add_product = cgutils.get_or_insert_function(builder.module, kind, name)
        none, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)

        def start(place: int, begin: Any) -> Any:
            data = context.make_array(signature.args[place])(context, builder, values[place]).data
            return builder.gep(data, [begin])

        def times(step: Any, *factors: Any) -> list[Any]:
            return [builder.mul(step, f) for f in factors]

        a, b, out = start(1, from_a), start(8, from_b), start(12, from_out)
        counts = [ir.Constant(index, r) for r in range(_MOST)]
        done = builder.append_basic_block("done")
        choice = builder.switch(rows, done)
        for count in range(1, _MOST + 1):
            block = builder.append_basic_block(f"rows_{count}")
            choice.add_case(ir.Constant(index, count), block)
            builder.position_at_end(block)
            targets = [
                builder.bitcast(builder.gep(out, [at]), vector.as_pointer())
                for at in times(row_out, *counts[:count])
            ]
            places = times(row_a, *counts[:count])
            sums = [cgutils.alloca_once(builder, vector) for _ in targets]
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(target, align=size), total)
            with cgutils.for_range(builder, outer) as i:
                at_a, at_b = builder.mul(i.index, outer_a), builder.mul(i.index, outer_b)
                line_a, line_b = builder.gep(a, [at_a]), builder.gep(b, [at_b])
                with cgutils.for_range(builder, inner) as j:
                    at = builder.gep(line_b, [builder.mul(j.index, inner_b)])
                    factor = builder.load(builder.bitcast(at, vector.as_pointer()), align=size)
                    element = builder.gep(line_a, [builder.mul(j.index, inner_a)])
                    for total, place in zip(sums, places, strict=True):
                        one = builder.load(builder.gep(element, [place]))
                        same = builder.insert_element(none, one, first)
                        same = builder.shuffle_vector(same, none, everywhere)
                        found = builder.call(add_product, [same, factor, builder.load(total)])
                        builder.store(found, total)
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(total), target, align=size)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    def tile(  # type: ignore[no-untyped-def]
        typing, rows, a, from_a, row_a, outer_a, inner_a, outer, inner,
        b, from_b, outer_b, inner_b, out, from_out, row_out,
    ):  # fmt: skip
        n = types.intp
        return types.void(n, a, n, n, n, n, n, n, b, n, n, n, out, n, n), emit

    return intrinsic(tile)


if ready:
    _one, _two = _tile_of(1), _tile_of(2)


@kernels.compiled
def _add(  # type: ignore[no-untyped-def]
    rows, a, from_a, row_a, outer_a, inner_a, outer, inner,
    b, from_b, outer_b, inner_b, out, from_out, row_out, channels,
):  # fmt: skip
    """The sums of a tile, for any number of rows and a multiple of 16 channels."""
    lanes = _REGISTER // out.itemsize
    done = 0
    while done < rows:
        tiles = (rows - done + _MOST - 1) // _MOST
        count = (rows - done + tiles - 1) // tiles  # even tiles
        at_a, at_out = from_a + done * row_a, from_out + done * row_out
        if channels % (2 * lanes) == 0:
            for c in range(0, channels, 2 * lanes):
                _two(
                    count, a, at_a, row_a, outer_a, inner_a, outer, inner,
                    b, from_b + c, outer_b, inner_b, out, at_out + c, row_out,
                )  # fmt: skip
        else:
            for c in range(0, channels, lanes):
                _one(
                    count, a, at_a, row_a, outer_a, inner_a, outer, inner,
                    b, from_b + c, outer_b, inner_b, out, at_out + c, row_out,
                )  # fmt: skip
        done += count


@kernels.compiled
def _walk(layers, k):  # type: ignore[no-untyped-def]
    """How a patch lies: runs, their length, from one run to the next; from one patch to the next
    one on its right, and to the next one below."""
    n_in, _, width, _, kernel, stride = layers[k, :6]
    if k == 0:
        return kernel * n_in, kernel, width, stride, stride * n_in * width
    return kernel, kernel * n_in, width * n_in, stride * n_in, stride * width * n_in


@kernels.compiled
def _scale(image, out):  # type: ignore[no-untyped-def]
    """Pixels [channels, height, width] of 0 to 255 as numbers of 0 to 1."""
    channels, height, width = image.shape
    white = out.dtype.type(255)
    for c in range(channels):
        for y in range(height):
            line, begin = image[c, y], (y * channels + c) * width
            scaled = out[begin : begin + width]
            for x in range(width):
                scaled[x] = out.dtype.type(line[x]) / white


@kernels.compiled
def pack(weights, biases, layers, packed):  # type: ignore[no-untyped-def]
    """Weights [n_out, n_in, kernel, kernel] and biases [n_out] of each convolution, as patches
    lie."""
    for k in range(len(weights)):
        weight, bias, begin = weights[k], biases[k], layers[k, 8]
        n_out, n_in, kernel, _ = weight.shape
        rows = packed[begin : begin + weight.size].reshape(kernel, kernel * n_in, n_out)
        for first in range(0, n_out, 16):  # of more, lines of the cache would not stay until used
            for i in range(n_in):
                for y in range(kernel):
                    for x in range(kernel):
                        row = rows[y, i * kernel + x if k == 0 else x * n_in + i]
                        for o in range(first, first + 16):
                            row[o] = weight[o, i, y, x]
        packed[begin + weight.size : begin + weight.size + n_out] = bias


@kernels.compiled
def unpack(packed, layers, weights, biases):  # type: ignore[no-untyped-def]
    """The way back, of the sum of both `packed`, [threads, n]."""
    total = packed[0]
    if packed.shape[0] > 1:
        other = packed[1]
        for i in range(total.size):
            total[i] += other[i]
    for k in range(len(weights)):
        weight, bias, begin = weights[k], biases[k], layers[k, 8]
        n_out, n_in, kernel, _ = weight.shape
        rows = total[begin : begin + weight.size].reshape(kernel, kernel * n_in, n_out)
        for first in range(0, n_out, 16):
            for i in range(n_in):
                for y in range(kernel):
                    for x in range(kernel):
                        row = rows[y, i * kernel + x if k == 0 else x * n_in + i]
                        for o in range(first, first + 16):
                            weight[o, i, y, x] = row[o]
        bias[:] = total[begin + weight.size : begin + weight.size + n_out]


@kernels.compiled
def turn(weights, layers, turned):  # type: ignore[no-untyped-def]
    """The same weights, but the first convolution's, as [kernel, kernel, n_out, n_in]."""
    for k in range(1, len(weights)):
        weight, begin = weights[k], layers[k, 9]
        n_out, n_in, kernel, _ = weight.shape
        rows = turned[begin : begin + weight.size].reshape(kernel, kernel, n_out, n_in)
        for o in range(n_out):
            for y in range(kernel):
                for x in range(kernel):
                    row = rows[y, x, o]
                    for i in range(n_in):
                        row[i] = weight[o, i, y, x]


@kernels.compiled
def forward(pixels, packed, layers, low, high, slot, slots, seen, scaled, features):  # type: ignore[no-untyped-def]
    """Features of the images `low` to `high`, through convolutions with a ReLU after each.

    pixels: [B, channels, height, width]; packed: from `pack`; slot: where in `seen`, memory for the
    outputs of so many `slots`, those of an image are kept, -1: at its own place; scaled: memory for
    one image; features: [B, n_out * height * width].
    """
    zero = features.dtype.type(0)
    for b in range(low, high):
        _scale(pixels[b], scaled)
        x, at = scaled, 0
        for k in range(layers.shape[0]):
            n_out, height, width = layers[k, 3], layers[k, 6], layers[k, 7]
            runs, length, next_run, right, below = _walk(layers, k)
            begin, size = layers[k, 8], height * width * n_out
            taps = runs * length
            start = layers[k, 10] * slots + (b if slot < 0 else slot) * size
            out = seen[start : start + size].reshape(height * width, n_out)
            bias = packed[begin + taps * n_out : begin + (taps + 1) * n_out]
            for p in range(height * width):
                out[p] = bias
            for y in range(height):
                _add(
                    width, x, at + y * below, right, next_run, 1, runs, length,
                    packed, begin, length * n_out, n_out,
                    seen, start + y * width * n_out, n_out, n_out,
                )  # fmt: skip
            flat = seen[start : start + size]
            for i in range(size):
                value = flat[i]  # what is no number stays none
                flat[i] = zero if value <= 0 else value
            x, at = seen, start
        last = layers.shape[0] - 1
        n_out, area = layers[last, 3], layers[last, 6] * layers[last, 7]
        out, found = seen[at : at + area * n_out].reshape(area, n_out), features[b]
        for o in range(n_out):
            for p in range(area):
                found[o * area + p] = out[p, o]


@kernels.compiled
def backward(  # type: ignore[no-untyped-def]
    pixels, turned, layers, low, high, slots, seen, scaled, spare, features, slope, slopes
):
    """Gradients of all convolutions by the images `low` to `high`, into `slopes`, which is laid out
    as `packed`.

    turned: from `turn`; seen: as `forward` left it; spare: memory for the outputs of one image;
    slope: gradient by the features, [B, n].
    """
    zero = slope.dtype.type(0)
    slopes[:] = 0
    for b in range(low, high):
        last = layers.shape[0] - 1
        n_out, area = layers[last, 3], layers[last, 6] * layers[last, 7]
        begin = layers[last, 10]
        errors = spare[begin : begin + area * n_out].reshape(area, n_out)
        back, active = slope[b], features[b]
        for o in range(n_out):
            for p in range(area):
                value = back[o * area + p]
                errors[p, o] = zero if active[o * area + p] <= 0 else value
        _scale(pixels[b], scaled)
        for k in range(last, -1, -1):
            n_in, n_out, height, width = layers[k, 0], layers[k, 3], layers[k, 6], layers[k, 7]
            runs, length, next_run, right, below = _walk(layers, k)
            begin, own = layers[k, 8], layers[k, 10]
            taps, area = runs * length, height * width
            errors = spare[own : own + area * n_out].reshape(area, n_out)
            total = slopes[begin + taps * n_out : begin + (taps + 1) * n_out]
            for p in range(area):
                row = errors[p]
                for o in range(n_out):
                    total[o] += row[o]
            x, at, size = scaled, 0, scaled.size
            if k > 0:
                size = layers[k, 1] * layers[k, 2] * n_in
                x, at = seen, layers[k - 1, 10] * slots + b * size
            for run in range(runs):
                _add(
                    length, x, at + run * next_run, 1, below, right, height, width,
                    spare, own, width * n_out, n_out,
                    slopes, begin + run * length * n_out, n_out, n_out,
                )  # fmt: skip
            if k == 0:
                continue
            below_own = layers[k - 1, 10]
            gradient = spare[below_own : below_own + size]
            gradient[:] = 0
            kernel = layers[k, 4]
            for y in range(height):
                for tap in range(kernel * kernel):
                    under = tap // kernel * next_run + tap % kernel * n_in
                    _add(
                        width, spare, own + y * width * n_out, n_out, 0, 1, 1, n_out,
                        turned, layers[k, 9] + tap * n_out * n_in, 0, n_in,
                        spare, below_own + y * below + under, right, n_in,
                    )  # fmt: skip
            active = seen[at : at + size]
            for i in range(size):
                value = gradient[i]
                gradient[i] = zero if active[i] <= 0 else value
