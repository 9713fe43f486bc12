// Runs AMX machine code on x86-64 Linux processors without AMX, for tests: every AMX instruction
// raises SIGILL there, and a handler decodes it, does its work and steps over it.
//
// Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2: the
// instructions' own pages and the AMX exception classes (section 2.10). What the manual calls #UD
// goes on to whoever handled SIGILL before (in the end the process dies of SIGILL), and #GP is a
// real one (SIGSEGV), as Linux has it on a processor with AMX. NaN payloads are the host's.
//
// Not emulated, hence #UD: instructions behind a segment (FS, GS, ...) or address-size prefix,
// AMX-FP16 and later extensions. Tile data belongs to a thread and starts out unconfigured.
// A processor that has AMX needs no emulator, only arch_prctl(ARCH_REQ_XCOMP_PERM): without that
// permission LDTILECFG runs there but TILELOADD does not, and this emulator sees one half of it.
#pragma once

#include <cstdint>

namespace kt {

enum class amx_instruction : uint8_t {
  ldtilecfg,
  sttilecfg,
  tilerelease,
  tilezero,
  tileloadd,
  tileloaddt1,
  tilestored,
  tdpbssd,
  tdpbsud,
  tdpbusd,
  tdpbuud,
  tdpbf16ps
};
constexpr int amx_instruction_count = 12;

// Takes SIGILL over, once: later calls do nothing. To be called after whoever else handles SIGILL
// (Python's faulthandler) has taken it: who takes it later gets the AMX instructions too.
void install_amx_emulator();

// Gives SIGILL back to whom it was taken from. False where somebody else has it by now: then
// nothing is changed.
bool uninstall_amx_emulator();

// How many instructions of a kind this process has emulated, faults not counted.
uint64_t amx_emulated(amx_instruction instruction);

}  // namespace kt
