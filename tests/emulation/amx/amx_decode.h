// Which AMX instruction a thread is about to execute, and its operands.
#pragma once

#include <ucontext.h>

#include <cstdint>

#include "amx_emulator.h"

namespace kt {

struct amx_decoded {
  amx_instruction instruction;
  uint8_t reg, rm, vvvv;
  uint64_t base;          // base register + displacement
  uint64_t scaled_index;  // the stride of tile loads and stores
  uint64_t next_rip;
};

// Decodes what RIP points at; reads no byte beyond the instruction. False for whatever is no AMX
// instruction or is #UD by its encoding alone.
bool decode_amx(const ucontext_t& context, amx_decoded& out);

}  // namespace kt
