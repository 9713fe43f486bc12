"""Four weights out of each 16-bit word, as the floats that tensor cores take.

A word holds four nibbles, the first in the lowest bits. A nibble needs no conversion to become a
float: put into the last places of the mantissa of a power of two whose last place counts 1, it is
that power plus the nibble, and one exact subtraction leaves the nibble minus 8:

    fp16: 0x6400 | q = 1024 + q        bf16: 0x4300 | q = 128 + q

Two words share a register, so that a `lop3` (mask, then or) and an `fma` (times 1: Ampere cannot
add bf16 otherwise) make two weights. All of these are integers below 2^11 or 2^8, exact in the
dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _ptx(floats: str, magic: str, one: str, subtracted: str) -> str:
    """Write the PTX: $0 to $3 from the words in $4, all in pairs."""
    lines = [
        ".reg .b32 word, one, less;",
        f"mov.b32 one, {one};",
        f"mov.b32 less, {subtracted};",
    ]
    for nibble in range(4):
        word = "word" if nibble else "$4"
        if nibble:
            lines.append(f"shr.u32 word, $4, {4 * nibble};")
        lines.append(f"lop3.b32 ${nibble}, {word}, 0x000f000f, {magic}, 0xea;")  # a & b | c
        lines.append(f"fma.rn.{floats} ${nibble}, ${nibble}, one, less;")
    return "{\n" + "\n".join(lines) + "\n}"


FP16_PTX = tl.constexpr(_ptx("f16x2", "0x64006400", "0x3c003c00", "0xe408e408"))  # 1, -1032
BF16_PTX = tl.constexpr(_ptx("bf16x2", "0x43004300", "0x3f803f80", "0xc308c308"))  # 1, -136


@triton.jit
def unpack_int4(words, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Return the four nibbles of int16 words, first to last, minus 8, as DTYPE.

    PTX chooses the instructions above, which the interpreter and GPUs of AMD have not, or the same
    in plain Triton.
    """
    if PTX and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            FP16_PTX, "=r,=r,=r,=r,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=2
        )
    elif PTX:
        return tl.inline_asm_elementwise(
            BF16_PTX, "=r,=r,=r,=r,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    else:
        # By way of fp32: from integers to bf16 the interpreter does not get.
        bits = words.to(tl.uint16, bitcast=True).to(tl.int32)
        return (
            ((bits & 15) - 8).to(tl.float32).to(DTYPE),
            ((bits >> 4 & 15) - 8).to(tl.float32).to(DTYPE),
            ((bits >> 8 & 15) - 8).to(tl.float32).to(DTYPE),
            ((bits >> 12) - 8).to(tl.float32).to(DTYPE),
        )
