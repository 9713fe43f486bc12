// Asks the processor (CPUID) and the operating system (XGETBV) which instruction sets are usable.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kt {

#if defined(__x86_64__)
namespace {

// Intel SDM vol. 2A, CPUID; vol. 1, 13.3 (XCR0 bits).
constexpr unsigned leaf1_ecx_fma = 1u << 12;
constexpr unsigned leaf1_ecx_osxsave = 1u << 27;
constexpr unsigned leaf1_ecx_avx = 1u << 28;
constexpr unsigned leaf1_ecx_f16c = 1u << 29;
constexpr unsigned leaf7_ebx_avx2 = 1u << 5;
constexpr unsigned leaf7_ebx_avx512f = 1u << 16;
constexpr unsigned leaf7_ebx_avx512bw = 1u << 30;
constexpr unsigned leaf7_ebx_avx512vl = 1u << 31;
constexpr unsigned leaf7_ecx_avx512vnni = 1u << 11;
constexpr unsigned leaf7_1_eax_avx_vnni = 1u << 4;
constexpr unsigned leaf7_1_eax_avx512_bf16 = 1u << 5;
constexpr unsigned leaf7_edx_amx_bf16 = 1u << 22;
constexpr unsigned leaf7_edx_amx_tile = 1u << 24;
constexpr unsigned leaf7_edx_amx_int8 = 1u << 25;
constexpr unsigned xcr0_ymm = 0x06;
constexpr unsigned xcr0_zmm = 0xe6;
constexpr unsigned xcr0_tiles = 0x60000;

// The kernel grants tile registers to a process that asks, for all its threads.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

unsigned xcr0() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool has(unsigned value, unsigned bits) { return (value & bits) == bits; }

struct supported {
  bool level[isa_count];
};

supported detect() {
  supported found{};
  const auto add = [&found](isa level) { found.level[static_cast<int>(level)] = true; };
  add(isa::portable);
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) ||
      !has(c, leaf1_ecx_osxsave | leaf1_ecx_avx | leaf1_ecx_f16c | leaf1_ecx_fma)) {
    return found;
  }
  const unsigned enabled = xcr0();
  if (!has(enabled, xcr0_ymm) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) ||
      !has(b, leaf7_ebx_avx2)) {
    return found;
  }
  add(isa::avx2);
  const unsigned subleaves = a;
  unsigned extra = 0;
  if (subleaves >= 1) {
    unsigned b1, c1, d1;
    __get_cpuid_count(7, 1, &extra, &b1, &c1, &d1);
  }
  if (has(extra, leaf7_1_eax_avx_vnni)) add(isa::avx_vnni);
  if (has(enabled, xcr0_zmm) &&
      has(b, leaf7_ebx_avx512f | leaf7_ebx_avx512bw | leaf7_ebx_avx512vl) &&
      has(c, leaf7_ecx_avx512vnni)) {
    add(isa::avx512_vnni);
    if (has(extra, leaf7_1_eax_avx512_bf16)) add(isa::avx512_bf16);
  }
  if (has(enabled, xcr0_tiles) && has(d, leaf7_edx_amx_tile) && tiles_granted()) {
    if (has(d, leaf7_edx_amx_int8)) add(isa::amx_int8);
    if (has(d, leaf7_edx_amx_bf16)) add(isa::amx_bf16);
  }
  return found;
}

}  // namespace

bool isa_supported(isa level) {
  static const supported found = detect();
  return found.level[static_cast<int>(level)];
}

#else

bool isa_supported(isa level) { return level == isa::portable; }

#endif

}  // namespace kt
