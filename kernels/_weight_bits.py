"""Weights in 8 bits as threads hold them, in assembly. Used by `_hopper_quantised.py`."""

import struct

import triton
import triton.language as tl

#: Elements of a row block that a thread of a warpgroup holds: of two rows, two and two in turn.
_HELD = 64


def _by_row(combine: str, first: int, apart: int, end: list[str]) -> str:
    """Assembly that combines the pairs of each of a thread's two rows, and what it does then with
    the last, `all0` or `all1`, and the row's first output.

    Args:
        first, apart: number of the first pair's operand, and of operands from one to the next.
        end: with `{row}`, `{out}` for the first output, and `{last}` for the row's last pair.
    """
    lines = []
    for row in range(2):
        pairs = [f"${first + apart * n}" for n in range(row, _HELD // 2, 2)]
        lines.append(f".reg .b32 all{row};")
        while len(pairs) > 1:
            into = [f"of{row}_{len(pairs)}_{n}" for n in range(len(pairs) // 2)]
            lines += [f".reg .b32 {x};" for x in into]
            lines += [
                f"{combine} {x}, {pairs[2 * n]}, {pairs[2 * n + 1]};" for n, x in enumerate(into)
            ]
            pairs = into
        lines.append(f"mov.b32 all{row}, {pairs[0]};")
        last = first + apart * (_HELD // 2 - 2 + row)
        lines += [line.format(row=row, out=2 * row, last=last) for line in end]
    return "\n".join(
        ["{", ".reg .b16 low, high;", ".reg .b32 bits, sign;", ".reg .f32 f, g;", *lines]
    )


def _operands(outputs: int, inputs: int) -> str:
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


# All elements of a row get its greatest, and a maximum of equals costs nothing. It is an integer of
# the same order, in which what is no number comes last.
_GREATEST = tl.constexpr(
    _by_row(
        "max.NaN.f16x2",
        _HELD,
        1,
        [
            "mov.b32 {{low, high}}, all{row};",
            "max.NaN.f16 low, low, high;",
            "cvt.f32.f16 f, low;",
            "mov.b32 bits, f;",
            "shr.s32 sign, bits, 31;",
            "or.b32 sign, sign, 0x80000000;",
            "xor.b32 all{row}, bits, sign;",
        ],
    )
    + "".join(f"\nmov.b32 ${n}, all{n // 2 % 2};" for n in range(_HELD))
    + "\n}"
)
# In units, as integers: the compiler leaves out the sums with 0. Weights are up to 640 where
# float16 rounds the maximum of a row by 16 ticks, and 128 of them must fit.
_UNITS = tl.constexpr(2.0**13)


def _sums(more: list[str]) -> str:
    """Assembly for the sum of each row; `more` is what is done with it, `f`, before it is cut."""
    end = [
        "mov.b32 {{low, high}}, all{row};",
        "cvt.f32.f16 f, low;",
        "cvt.f32.f16 g, high;",
        "add.f32 f, f, g;",
        *more,
        f"mul.f32 f, f, 0f{struct.pack('>f', _UNITS.value).hex()};",
        "cvt.rni.s32.f32 ${out}, f;",
    ]
    zeros = "".join(f"\nmov.b32 ${n}, 0;" for n in range(_HELD) if n not in (0, 2))
    return _by_row("add.f16x2", _HELD, 2, end) + zeros + "\n}"


_SUMS = tl.constexpr(_sums([]))
# And the last weight of the row times the number beside it.
_SUMS_SHORT = tl.constexpr(
    _sums(
        [
            "mov.b32 {{low, high}}, ${last};",
            "cvt.f32.f16 g, high;",
            f"fma.rn.f32 f, g, ${3 * _HELD - 4}, f;",
        ]
    )
)
_GREATEST_OPERANDS = tl.constexpr(_operands(_HELD, _HELD // 2))
_SUMS_OPERANDS = tl.constexpr(_operands(_HELD, _HELD))
_SUMS_SHORT_OPERANDS = tl.constexpr(_operands(_HELD, _HELD) + ",f" * _HELD)


@triton.jit
def _packed(p):
    """Four weights that a thread holds as e4m3 in the bits of the first; the others hold nothing.

    Carried through the loop as bytes they would be packed and unpacked one by one.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $5, $4;
        cvt.rn.satfinite.e4m3x2.f32 high, $7, $6;
        mov.b32 $0, {low, high};
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        }""",
        "=r,=r,=r,=r,f,f,f,f",
        [p],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _unpacked(bits):
    """The bytes that `_packed` has put into the bits of every fourth."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [bits], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _nothing(like):
    """Zeros that the compiler does not know for such: it stumbles over a constant accumulator."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=f,f", [like], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _greatest(scores):
    """The greatest score of each row, in float32; no number if one of them is none."""
    each = tl.inline_asm_elementwise(
        _GREATEST, _GREATEST_OPERANDS, [scores], dtype=tl.int32, is_pure=True, pack=64
    )
    key = tl.max(each.to(tl.uint32, bitcast=True), 1)
    return tl.where(key >= 0x80000000, key ^ 0x80000000, ~key).to(tl.float32, bitcast=True)


@triton.jit
def _weights(scores, factor, origin):
    """2^(n / 32 - 47) for n = scores * factor + origin from 1024 on, with a straight line between
    powers of two, and 0 below, as two float16 in the bits of every other element; the others hold
    nothing. The last 10 bits of n, shifted, are that in float16.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 least, back, n;
        mov.b32 least, 0x64006400;
        mov.b32 back, 0x7ff38000;
        fma.rn.f16x2 n, $4, $6, $8;
        max.f16x2 n, n, least;
        mad.lo.u32 $0, n, 32, back;
        mov.b32 $1, 0;
        fma.rn.f16x2 n, $5, $7, $9;
        max.f16x2 n, n, least;
        mad.lo.u32 $2, n, 32, back;
        mov.b32 $3, 0;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        [scores, factor.to(tl.float16), origin.to(tl.float16)[:, None]],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _packed_pairs(pairs):
    """`_packed` of what `_weights` made."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f16x2 low, $4;
        cvt.rn.satfinite.e4m3x2.f16x2 high, $6;
        mov.b32 $0, {low, high};
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [pairs],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _mass_of_pairs(pairs, length, SHORT: tl.constexpr):
    """`_mass` of what `_weights` made."""
    if SHORT:  # taken off before threads share their sums, not behind a second sum over them
        size: tl.constexpr = pairs.shape[1]
        picked = tl.arange(0, size)[None, :] == size - 2
        often = tl.where(picked, (length - size).to(tl.float32), 0.0)
        parts = tl.inline_asm_elementwise(
            _SUMS_SHORT, _SUMS_SHORT_OPERANDS, [pairs, often],
            dtype=tl.int32, is_pure=True, pack=64,
        )  # fmt: skip
    else:
        parts = tl.inline_asm_elementwise(
            _SUMS, _SUMS_OPERANDS, [pairs], dtype=tl.int32, is_pure=True, pack=64
        )
    return tl.sum(parts, 1).to(tl.float32) * (1 / _UNITS)
