// Every register as a base and as a stride, every scale and size of displacement, as the assembler
// encodes them.
#include <immintrin.h>
#include <sys/mman.h>

#include <cstring>
#include <random>

#include "amx_test.h"

namespace kt_test {
namespace {

// Each form loads tile 0 from the pointer in rax by the stride in rcx, which it is given
// divided by its scale.
struct address_form {
  const char* name;
  int scale;  // 0: no index, a stride of 0
  void (*load)(const void* from, long index);
};

// Where the form without a base register has its memory.
constexpr uintptr_t fixed_address = 0x10000000;

const address_form address_forms[] = {
    {"rcx rax", 1,
     [](const void* p, long i) {
       asm volatile("xchg %%rax, %%rcx; tileloadd (%%rcx,%%rax,1), %%tmm0"
                    : "+a"(p), "+c"(i)::"memory");
     }},
    {"rdx rbx 2", 2,
     [](const void* p, long i) {
       asm volatile("mov %0, %%rdx; mov %1, %%rbx; tileloadd (%%rdx,%%rbx,2), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "rdx", "rbx", "memory");
     }},
    {"rbx rdx 4", 4,
     [](const void* p, long i) {
       asm volatile("mov %0, %%rbx; mov %1, %%rdx; tileloadd (%%rbx,%%rdx,4), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "rdx", "rbx", "memory");
     }},
    {"rsi rdi 8", 8,
     [](const void* p, long i) {
       asm volatile("mov %0, %%rsi; mov %1, %%rdi; tileloadd (%%rsi,%%rdi,8), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "rsi", "rdi", "memory");
     }},
    {"rdi rsi", 1,
     [](const void* p, long i) {
       asm volatile("mov %0, %%rdi; mov %1, %%rsi; tileloadd (%%rdi,%%rsi,1), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "rsi", "rdi", "memory");
     }},
    {"r8 r9", 1,
     [](const void* p, long i) {
       asm volatile("mov %0, %%r8; mov %1, %%r9; tileloadd (%%r8,%%r9,1), %%tmm0" ::"a"(p), "c"(i)
                    : "r8", "r9", "memory");
     }},
    {"r9 r8 2", 2,
     [](const void* p, long i) {
       asm volatile("mov %0, %%r9; mov %1, %%r8; tileloadd (%%r9,%%r8,2), %%tmm0" ::"a"(p), "c"(i)
                    : "r8", "r9", "memory");
     }},
    {"r10 r11 4", 4,
     [](const void* p, long i) {
       asm volatile("mov %0, %%r10; mov %1, %%r11; tileloadd (%%r10,%%r11,4), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "r10", "r11", "memory");
     }},
    {"r11 r10 8", 8,
     [](const void* p, long i) {
       asm volatile("mov %0, %%r11; mov %1, %%r10; tileloadd (%%r11,%%r10,8), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "r10", "r11", "memory");
     }},
    {"r12 r13", 1,
     [](const void* p, long i) {
       asm volatile("mov %0, %%r12; mov %1, %%r13; tileloadd (%%r12,%%r13,1), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "r12", "r13", "memory");
     }},
    {"r13 r12", 1,
     [](const void* p, long i) {
       asm volatile("mov %0, %%r13; mov %1, %%r12; tileloadd (%%r13,%%r12,1), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "r12", "r13", "memory");
     }},
    {"r14 r15 2", 2,
     [](const void* p, long i) {
       asm volatile("mov %0, %%r14; mov %1, %%r15; tileloadd (%%r14,%%r15,2), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "r14", "r15", "memory");
     }},
    {"r15 r14 4", 4,
     [](const void* p, long i) {
       asm volatile("mov %0, %%r15; mov %1, %%r14; tileloadd (%%r15,%%r14,4), %%tmm0" ::"a"(p),
                    "c"(i)
                    : "r14", "r15", "memory");
     }},
    {"rbp", 1,
     [](const void* p, long i) {
       asm volatile(
           "mov %%rbp, %%rdx; mov %0, %%rbp; tileloadd (%%rbp,%%rcx,1), %%tmm0;"
           "mov %%rdx, %%rbp" ::"a"(p),
           "c"(i)
           : "rdx", "memory");
     }},
    {"rbp as index", 8,
     [](const void* p, long i) {
       asm volatile(
           "mov %%rbp, %%rdx; mov %1, %%rbp; tileloadd (%%rax,%%rbp,8), %%tmm0;"
           "mov %%rdx, %%rbp" ::"a"(p),
           "c"(i)
           : "rdx", "memory");
     }},
    // The kernel puts the signal's frame below rsp, where there is room and nothing to lose.
    {"rsp", 1,
     [](const void* p, long i) {
       asm volatile(
           "mov %%rsp, %%rdx; mov %0, %%rsp; tileloadd (%%rsp,%%rcx,1), %%tmm0;"
           "mov %%rdx, %%rsp" ::"a"(p),
           "c"(i)
           : "rdx", "memory");
     }},
    {"rsp + disp8", 2,
     [](const void* p, long i) {
       asm volatile(
           "mov %%rsp, %%rdx; lea 64(%0), %%rsp; tileloadd -64(%%rsp,%%rcx,2), %%tmm0;"
           "mov %%rdx, %%rsp" ::"a"(p),
           "c"(i)
           : "rdx", "memory");
     }},
    {"disp8 -128", 1,
     [](const void* p, long i) {
       asm volatile("lea 128(%0), %%rdx; tileloadd -128(%%rdx,%%rcx,1), %%tmm0" ::"a"(p), "c"(i)
                    : "rdx", "memory");
     }},
    {"disp8 127", 2,
     [](const void* p, long i) {
       asm volatile("lea -127(%0), %%r13; tileloadd 127(%%r13,%%rcx,2), %%tmm0" ::"a"(p), "c"(i)
                    : "r13", "memory");
     }},
    {"disp32", 4,
     [](const void* p, long i) {
       asm volatile(
           "lea -0x1234567(%0), %%rdx; tileloadd 0x1234567(%%rdx,%%rcx,4), %%tmm0" ::"a"(p), "c"(i)
           : "rdx", "memory");
     }},
    {"disp32, negative", 8,
     [](const void* p, long i) {
       asm volatile(
           "lea 0x7654321(%0), %%r13; tileloadd -0x7654321(%%r13,%%rcx,8), %%tmm0" ::"a"(p), "c"(i)
           : "r13", "memory");
     }},
    {"no base", 2,
     [](const void*, long i) {
       asm volatile("tileloadd 0x10000000(,%%rcx,2), %%tmm0" ::"c"(i) : "memory");
     }},
    {"no index", 0,
     [](const void* p, long) { asm volatile("tileloadd (%0), %%tmm0" ::"a"(p)
                                            : "memory"); }},
    {"no index, disp8", 0,
     [](const void* p, long) {
       asm volatile("lea -8(%0), %%rdx; tileloadd 8(%%rdx), %%tmm0" ::"a"(p) : "rdx", "memory");
     }},
    {"neither base nor index", 0, [](const void*, long) {
       asm volatile("tileloadd 0x10000000, %%tmm0" ::: "memory");
     }}};

}  // namespace

void test_addresses(std::mt19937& random) {
  constexpr size_t size = 1 << 17, middle = size / 2;
  void* wanted = reinterpret_cast<void*>(fixed_address - middle);
  void* mapped = mmap(wanted, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  expect(mapped == wanted, "memory for the forms without a base register");
  if (mapped != wanted) return;
  auto* memory = static_cast<uint8_t*>(mapped);
  for (const address_form& form : address_forms) {
    for (long stride : {72L, 64L, 4000L, -72L}) {
      // The frame of the signal lies where these rows would.
      if (stride < 0 && std::strncmp(form.name, "rsp", 3) == 0) continue;
      for (size_t i = 0; i < size; ++i) memory[i] = static_cast<uint8_t>(random());
      const long step = form.scale == 0 ? 0 : stride;
      uint8_t expected[16][64], loaded[16][64] = {};
      for (int row = 0; row < 16; ++row) {
        std::memcpy(expected[row], memory + middle + row * step, sizeof(expected[row]));
      }
      load_config(shaped({{16, 64}}));
      form.load(memory + middle, form.scale == 0 ? 0 : stride / form.scale);
      _tile_stored(0, loaded, 64);
      expect(std::memcmp(loaded, expected, sizeof(expected)) == 0, form.name);
    }
  }
  munmap(mapped, size);
}

}  // namespace kt_test
