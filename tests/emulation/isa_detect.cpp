// Stands in for csrc/isa_detect.cpp where AVX-512, AVX-VNNI and AMX are emulated.
#include "isa.h"

#if defined(KT_AMX)
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_emulator.h"
#endif

namespace kt {
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("fma");
}

// On a machine that has AMX its own is used.
bool has_amx() {
#if defined(KT_AMX)
  static const bool ready = [] {
    constexpr long request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) install_amx_emulator();
    return true;
  }();
  return ready && has_avx2();
#else
  return false;
#endif
}

}  // namespace

bool isa_supported(isa level) {
  switch (level) {
    case isa::portable:
    case isa::avx512_vnni:
    case isa::avx512_bf16:
      return true;
    case isa::avx2:
    case isa::avx_vnni:  // emulated by means of AVX2
      return has_avx2();
    case isa::amx_int8:
    case isa::amx_bf16:
      return has_amx();
  }
  return false;
}

}  // namespace kt
