// Encodings: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2A, 2.1.5 (ModRM
// and SIB), 2.3.5 (VEX), and the instructions' own pages.
#include "amx_decode.h"

#include <cstring>

namespace kt {
namespace {

// The order of the encoding.
constexpr int general_registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                       REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                       REG_R12, REG_R13, REG_R14, REG_R15};

uint64_t general(const ucontext_t& context, int number) {
  return static_cast<uint64_t>(context.uc_mcontext.gregs[general_registers[number]]);
}

template <typename T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// The instruction that an opcode means, or amx_instruction_count.
int find_instruction(uint8_t opcode, int pp, uint8_t modrm) {
  using amx = amx_instruction;
  enum prefix { none, p66, pf3, pf2 };
  struct entry {
    uint8_t opcode;
    prefix pp;
    bool memory;
    uint8_t fixed, value;  // the bits of ModRM that are part of the opcode
    amx_instruction instruction;
  };
  static constexpr entry entries[] = {{0x49, none, true, 0x00, 0x00, amx::ldtilecfg},
                                      {0x49, p66, true, 0x00, 0x00, amx::sttilecfg},
                                      {0x49, none, false, 0xff, 0xc0, amx::tilerelease},
                                      {0x49, pf2, false, 0x07, 0x00, amx::tilezero},
                                      {0x4b, pf2, true, 0x07, 0x04, amx::tileloadd},
                                      {0x4b, p66, true, 0x07, 0x04, amx::tileloaddt1},
                                      {0x4b, pf3, true, 0x07, 0x04, amx::tilestored},
                                      {0x5e, pf2, false, 0x00, 0x00, amx::tdpbssd},
                                      {0x5e, pf3, false, 0x00, 0x00, amx::tdpbsud},
                                      {0x5e, p66, false, 0x00, 0x00, amx::tdpbusd},
                                      {0x5e, none, false, 0x00, 0x00, amx::tdpbuud},
                                      {0x5c, pf3, false, 0x00, 0x00, amx::tdpbf16ps}};
  for (const entry& e : entries) {
    if (e.opcode == opcode && e.pp == pp && e.memory == (modrm >> 6 != 3) &&
        (modrm & e.fixed) == e.value) {
      return static_cast<int>(e.instruction);
    }
  }
  return amx_instruction_count;
}

// Reads SIB and displacement, and no byte more: the next page may not be there.
const uint8_t* decode_memory(const ucontext_t& context, const uint8_t* at, uint8_t modrm, bool x,
                             bool b, amx_decoded& out) {
  const int mod = modrm >> 6;
  int base = modrm & 7, index = 4;
  bool no_base = mod == 0 && base == 5;
  const bool rip_relative = no_base;
  if (base == 4) {
    const uint8_t sib = *at++;
    base = sib & 7;
    no_base = mod == 0 && base == 5;
    index = (sib >> 3 & 7) | x << 3;
    if (index != 4) out.scaled_index = general(context, index) << (sib >> 6);
  }
  if (!no_base) out.base = general(context, base | b << 3);
  if (mod == 1) {
    out.base += static_cast<uint64_t>(int64_t{read<int8_t>(at)});
    at += 1;
  } else if (mod == 2 || no_base) {
    out.base += static_cast<uint64_t>(int64_t{read<int32_t>(at)});
    at += 4;
  }
  if (rip_relative) out.base += reinterpret_cast<uint64_t>(at);
  return at;
}

}  // namespace

bool decode_amx(const ucontext_t& context, amx_decoded& out) {
  const auto* at = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
  if (*at++ != 0xc4) return false;  // three-byte VEX
  const uint8_t rxb_map = *at++;
  if ((rxb_map & 0x1f) != 2) return false;  // map 0F38
  const uint8_t w_vvvv_l_pp = *at++;
  if ((w_vvvv_l_pp & 0x84) != 0) return false;  // W0, L0
  const uint8_t opcode = *at++;
  if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c && opcode != 0x5e) return false;
  const uint8_t modrm = *at++;
  const int found = find_instruction(opcode, w_vvvv_l_pp & 3, modrm);
  if (found == amx_instruction_count) return false;

  out = {};
  out.instruction = static_cast<amx_instruction>(found);
  const bool r = !(rxb_map & 0x80), x = !(rxb_map & 0x40), b = !(rxb_map & 0x20);
  out.reg = static_cast<uint8_t>((modrm >> 3 & 7) | r << 3);
  out.vvvv = static_cast<uint8_t>(~w_vvvv_l_pp >> 3 & 15);
  if (modrm >> 6 != 3) {
    at = decode_memory(context, at, modrm, x, b, out);
  } else {
    out.rm = static_cast<uint8_t>((modrm & 7) | b << 3);
    if (x) return false;
  }
  out.next_rip = reinterpret_cast<uint64_t>(at);
  const bool three_tiles = out.instruction >= amx_instruction::tdpbssd;
  const bool one_tile = out.instruction >= amx_instruction::tilezero && !three_tiles;
  if (!three_tiles && (out.vvvv != 0 || out.rm != 0)) return false;
  return three_tiles || one_tile || out.reg == 0;  // the digit /0 of the configurations
}

}  // namespace kt
