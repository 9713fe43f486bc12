// Every emulated AMX instruction, as compiler and assembler write it, against a model that is
// written to be obvious. Where the machine has AMX the same expectations are held against that.
//
// GCC 12's _tile_loadd and _tile_loadconfig do not say that they read memory: a compiler barrier
// stands before them wherever a buffer was just written.
#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "amx_emulator.h"
#include "amx_test.h"

namespace kt_test {
namespace {

using kt::amx_instruction;

std::atomic<int> failures{0};

void barrier() { asm volatile("" ::: "memory"); }

// Intel SDM vol. 2A, CPUID; vol. 1, 13.3 (XCR0 bits); Linux Documentation/arch/x86/xstate.rst.
bool machine_grants_amx() {
  constexpr unsigned leaf1_ecx_osxsave = 1u << 27;
  constexpr unsigned leaf7_edx_amx = 1u << 22 | 1u << 24 | 1u << 25;  // BF16, TILE, INT8
  constexpr unsigned xcr0_tiles = 0x60000;
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & leaf1_ecx_osxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & leaf7_edx_amx) != leaf7_edx_amx) {
    return false;
  }
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & xcr0_tiles) == xcr0_tiles &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// A tile's configured part, row after row.
struct matrix {
  int rows, colsb;
  std::vector<uint8_t> bytes;

  matrix(int r, int c) : rows(r), colsb(c), bytes(static_cast<size_t>(r * c)) {}
  tile_shape shape() const { return {rows, colsb}; }
  template <typename T>
  T get(int row, int column) const {
    T value;
    std::memcpy(&value, &bytes[static_cast<size_t>(row * colsb) + column * sizeof(T)], sizeof(T));
    return value;
  }
  template <typename T>
  void set(int row, int column, T value) {
    std::memcpy(&bytes[static_cast<size_t>(row * colsb) + column * sizeof(T)], &value, sizeof(T));
  }
};

matrix random_matrix(std::mt19937& random, int rows, int colsb) {
  matrix made(rows, colsb);
  for (uint8_t& byte : made.bytes) byte = static_cast<uint8_t>(random());
  return made;
}

matrix filled(int rows, int colsb, uint8_t byte) {
  matrix made(rows, colsb);
  made.bytes.assign(made.bytes.size(), byte);
  return made;
}

// Tile instructions on any tile: GCC's intrinsics take literals only.
template <int t>
void load(const void* from, long stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
}

template <int t>
void store(void* to, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
}

template <int t>
matrix stored(int rows, int colsb) {
  matrix out(rows, colsb);
  store<t>(out.bytes.data(), colsb);
  return out;
}

// The model.

// c[m][n] += sum over k and the 4 bytes of a dword of a[m][k] * b[k][n], modulo 2^32.
template <typename A, typename B>
matrix model_bytes(const matrix& a, const matrix& b, const matrix& c) {
  matrix out = c;
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.colsb / 4; ++n) {
      int64_t sum = c.get<int32_t>(m, n);
      for (int k = 0; k < b.rows; ++k) {
        for (int i = 0; i < 4; ++i) {
          sum += int64_t{a.get<A>(m, 4 * k + i)} * int64_t{b.get<B>(k, 4 * n + i)};
        }
      }
      out.set(m, n, static_cast<uint32_t>(sum));
    }
  }
  return out;
}

float flushed(float value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}

float widened(uint16_t bf16) { return flushed(std::bit_cast<float>(uint32_t{bf16} << 16)); }

// Even and odd products are summed apart, by fused multiply-add from +0, then added to each other
// and to c; each step rounds to nearest even, takes subnormals for zero and gives zero for them.
matrix model_bf16(const matrix& a, const matrix& b, const matrix& c) {
  matrix out = c;
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.colsb / 4; ++n) {
      float sums[2] = {0, 0};
      for (int k = 0; k < b.rows; ++k) {
        for (int i = 0; i < 2; ++i) {
          sums[i] = flushed(std::fma(widened(a.get<uint16_t>(m, 2 * k + i)),
                                     widened(b.get<uint16_t>(k, 2 * n + i)), sums[i]));
        }
      }
      out.set(m, n, flushed(flushed(c.get<float>(m, n)) + flushed(sums[0] + sums[1])));
    }
  }
  return out;
}

// Payloads of NaN are not specified.
bool same_floats(const matrix& a, const matrix& b) {
  for (int m = 0; m < a.rows; ++m) {
    for (int n = 0; n < a.colsb / 4; ++n) {
      const bool both_nan = std::isnan(a.get<float>(m, n)) && std::isnan(b.get<float>(m, n));
      if (!both_nan && a.get<uint32_t>(m, n) != b.get<uint32_t>(m, n)) return false;
    }
  }
  return true;
}

// Dot products.

// By intrinsics, on tiles 0, 1 and 2.
matrix multiply(amx_instruction instruction, const matrix& a, const matrix& b, const matrix& c) {
  load_config(shaped({c.shape(), a.shape(), b.shape()}));
  barrier();
  _tile_loadd(0, c.bytes.data(), c.colsb);
  _tile_loadd(1, a.bytes.data(), a.colsb);
  _tile_stream_loadd(2, b.bytes.data(), b.colsb);
  if (instruction == amx_instruction::tdpbssd) _tile_dpbssd(0, 1, 2);
  if (instruction == amx_instruction::tdpbsud) _tile_dpbsud(0, 1, 2);
  if (instruction == amx_instruction::tdpbusd) _tile_dpbusd(0, 1, 2);
  if (instruction == amx_instruction::tdpbuud) _tile_dpbuud(0, 1, 2);
  if (instruction == amx_instruction::tdpbf16ps) _tile_dpbf16ps(0, 1, 2);
  matrix out(c.rows, c.colsb);
  _tile_stored(0, out.bytes.data(), out.colsb);
  _tile_release();
  return out;
}

void expect_byte_products(const matrix& a, const matrix& b, const matrix& c) {
  expect(multiply(amx_instruction::tdpbssd, a, b, c).bytes ==
             model_bytes<int8_t, int8_t>(a, b, c).bytes,
         "tdpbssd");
  expect(multiply(amx_instruction::tdpbsud, a, b, c).bytes ==
             model_bytes<int8_t, uint8_t>(a, b, c).bytes,
         "tdpbsud");
  expect(multiply(amx_instruction::tdpbusd, a, b, c).bytes ==
             model_bytes<uint8_t, int8_t>(a, b, c).bytes,
         "tdpbusd");
  expect(multiply(amx_instruction::tdpbuud, a, b, c).bytes ==
             model_bytes<uint8_t, uint8_t>(a, b, c).bytes,
         "tdpbuud");
}

void test_byte_products(std::mt19937& random) {
  for (int m : {1, 2, 15, 16}) {
    for (int n : {1, 2, 15, 16}) {
      for (int k : {1, 2, 15, 16}) {
        expect_byte_products(random_matrix(random, m, 4 * k), random_matrix(random, k, 4 * n),
                             random_matrix(random, m, 4 * n));
      }
    }
  }
  for (uint8_t a : {0x00, 0x7f, 0x80, 0xff}) {
    for (uint8_t b : {0x00, 0x7f, 0x80, 0xff}) {
      for (uint32_t c : {0u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
        matrix sums(16, 64);
        for (int i = 0; i < 256; ++i) sums.set(0, i, c);
        expect_byte_products(filled(16, 64, a), filled(16, 64, b), sums);
      }
    }
  }
}

// Mostly numbers whose sums cancel and round; in `special`, all that floating point has.
matrix random_bf16(std::mt19937& random, int rows, int colsb, bool special) {
  static const uint16_t values[] = {
      0x0000, 0x8000, 0x3f80, 0xbf80,  // 0, 1
      0x7f80, 0xff80, 0x7fc0, 0x7f81,  // infinity, quiet and signalling NaN
      0x0001, 0x807f, 0x0080, 0x8080,  // subnormal, the smallest normal
      0x7f7f, 0xff7f, 0x1fff, 0x9f81,  // the largest, products that are subnormal or about
      0x2000, 0xa001, 0x5f80, 0xdf80};
  matrix made(rows, colsb);
  for (int i = 0; i < rows * colsb / 2; ++i) {
    uint16_t value = static_cast<uint16_t>((random() & 0x807f) | (120 + random() % 16) << 7);
    if (special && random() % 4 == 0) value = values[random() % std::size(values)];
    made.set(0, i, value);
  }
  return made;
}

void test_bf16_products(std::mt19937& random) {
  for (int m : {1, 2, 15, 16}) {
    for (int n : {1, 2, 15, 16}) {
      for (int k : {1, 2, 15, 16}) {
        for (bool special : {false, true}) {
          const matrix a = random_bf16(random, m, 4 * k, special);
          const matrix b = random_bf16(random, k, 4 * n, special);
          const matrix c = random_bf16(random, m, 4 * n, special);
          expect(same_floats(multiply(amx_instruction::tdpbf16ps, a, b, c), model_bf16(a, b, c)),
                 "tdpbf16ps");
        }
      }
    }
  }
}

// c + (x * y + y * 1), each value against each: in sums of many, all would end in NaN.
void test_bf16_pairs() {
  const uint16_t values[] = {0x0000, 0x8000, 0x3f80, 0xbf81, 0x7f80, 0xff80, 0x7fc0,
                             0x0001, 0x807f, 0x0080, 0x8080, 0x00ff, 0x7f7f, 0xff7f,
                             0x1fff, 0x9f81, 0x2000, 0xa001, 0x5f80, 0xdf80, 0x5fff};
  const uint32_t sums[] = {0x00000000, 0x80000000, 0x3f800001, 0x00000001, 0x807fffff,
                           0x00800000, 0x80800000, 0x7f7fffff, 0xff7fffff, 0x7f800000};
  for (uint16_t x : values) {
    for (uint16_t y : values) {
      matrix a(1, 8), b(2, 4), c(1, 4);
      a.set(0, 0, x), b.set(0, 0, y);
      a.set(0, 2, y), b.set<uint16_t>(1, 0, 0x3f80);
      for (uint32_t sum : sums) {
        c.set(0, 0, sum);
        expect(same_floats(multiply(amx_instruction::tdpbf16ps, a, b, c), model_bf16(a, b, c)),
               "tdpbf16ps of two values");
      }
    }
  }
}

// What separates a fused multiply-add from a product that is rounded first.
void test_bf16_is_fused() {
  matrix a(1, 8), b(2, 4), c(1, 4);
  a.set<uint16_t>(0, 0, 0x7f00);  // -2^127 * 1 + 2^127 * 2: the product alone overflows
  b.set<uint16_t>(0, 0, 0xbf80);
  a.set<uint16_t>(0, 2, 0x7f00);
  b.set<uint16_t>(1, 0, 0x4000);
  const matrix overflow = multiply(amx_instruction::tdpbf16ps, a, b, c);
  expect(overflow.get<float>(0, 0) == 0x1p127f, "a product beyond the largest float");

  a.set<uint16_t>(0, 0, 0x0080);  // 2^-126 * 1.5 - 2^-64 * 2^-64: the product alone is subnormal
  b.set<uint16_t>(0, 0, 0x3fc0);
  a.set<uint16_t>(0, 2, 0x1f80);
  b.set<uint16_t>(1, 0, 0x9f80);
  const matrix underflow = multiply(amx_instruction::tdpbf16ps, a, b, c);
  expect(underflow.get<float>(0, 0) == 0x1.4p-126f, "a product below the smallest normal float");
}

void test_mxcsr_plays_no_part() {
  matrix a(1, 4), b(1, 4), c(1, 4);
  a.set<uint16_t>(0, 0, 0x3f81), b.set<uint16_t>(0, 0, 0x3f81);
  a.set<uint16_t>(0, 1, 0x3f80), b.set<uint16_t>(0, 1, 0x3380);  // 2^-24: to nearest is up or down
  c.set(0, 0, 0x1.000002p+1f);
  const matrix nearest = multiply(amx_instruction::tdpbf16ps, a, b, c);
  const unsigned before = _mm_getcsr();
  for (unsigned rounding : {0x2000u, 0x4000u, 0x6000u}) {
    _mm_setcsr((before & ~0x6000u) | rounding);
    const unsigned set = _mm_getcsr();
    const matrix out = multiply(amx_instruction::tdpbf16ps, a, b, c);
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    expect(out.bytes == nearest.bytes, "MXCSR changes TDPBF16PS");
    expect(after == set, "TDPBF16PS changes MXCSR");
  }
}

// Tiles.

template <int dst, int src1, int src2>
void test_products_of(std::mt19937& random) {
  const matrix a = random_matrix(random, 7, 36), b = random_matrix(random, 9, 20);
  const matrix c = random_matrix(random, 7, 20);
  tile_config config;
  for (const auto& [t, shape] : {std::pair{dst, c.shape()}, {src1, a.shape()}, {src2, b.shape()}}) {
    config.rows[t] = static_cast<uint8_t>(shape.rows);
    config.colsb[t] = static_cast<uint16_t>(shape.colsb);
  }
  load_config(config);
  load<dst>(c.bytes.data(), c.colsb);
  load<src1>(a.bytes.data(), a.colsb);
  load<src2>(b.bytes.data(), b.colsb);
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(dst), "i"(src1), "i"(src2));
  matrix expected = model_bytes<int8_t, int8_t>(a, b, c);
  expect(stored<dst>(7, 20).bytes == expected.bytes, "tdpbssd on other tiles");
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(dst), "i"(src1), "i"(src2));
  expected = model_bytes<uint8_t, int8_t>(a, b, expected);
  expect(stored<dst>(7, 20).bytes == expected.bytes, "tdpbusd on other tiles");
  expect(stored<src1>(7, 36).bytes == a.bytes && stored<src2>(9, 20).bytes == b.bytes,
         "sources stay as they were");
}

template <int t>
void test_tile(std::mt19937& random) {
  test_products_of<t, (t + 3) % 8, (t + 5) % 8>(random);
  test_products_of<t, (t + 6) % 8, (t + 1) % 8>(random);

  tile_config config;
  for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.colsb[i] = 64;
  load_config(config);
  const matrix zero(16, 64), one = random_matrix(random, 16, 64),
                             other = random_matrix(random, 16, 64);
  expect(stored<t>(16, 64).bytes == zero.bytes, "LDTILECFG clears tiles");
  load<t>(one.bytes.data(), 64);
  load<(t + 1) % 8>(other.bytes.data(), 64);
  expect(stored<t>(16, 64).bytes == one.bytes, "a tile holds what was loaded");
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
  expect(stored<t>(16, 64).bytes == zero.bytes, "TILEZERO clears its tile");
  expect(stored<(t + 1) % 8>(16, 64).bytes == other.bytes, "TILEZERO leaves other tiles");
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(one.bytes.data()), "r"(64L), "i"(t)
               : "memory");
  expect(stored<t>(16, 64).bytes == one.bytes, "TILELOADDT1 loads");
  load_config(config);
  expect(stored<t>(16, 64).bytes == zero.bytes, "LDTILECFG clears tiles again");
}

void test_strides(std::mt19937& random) {
  std::vector<uint8_t> memory(1 << 17);
  for (uint8_t& byte : memory) byte = static_cast<uint8_t>(random());
  const size_t middle = memory.size() / 2 + 3;
  for (long stride : {0L, 1L, 4L, 20L, 63L, 64L, 65L, 100L, 4096L, -1L, -4L, -64L, -100L, -4000L}) {
    for (tile_shape shape : {tile_shape{1, 4}, {3, 20}, {16, 60}, {16, 64}}) {
      load_config(shaped({shape}));
      matrix expected(shape.rows, shape.colsb);
      for (int row = 0; row < shape.rows; ++row) {
        std::memcpy(&expected.bytes[static_cast<size_t>(row * shape.colsb)],
                    memory.data() + middle + row * stride, static_cast<size_t>(shape.colsb));
      }
      load<0>(memory.data() + middle, stride);
      expect(stored<0>(shape.rows, shape.colsb).bytes == expected.bytes, "TILELOADD by a stride");

      std::vector<uint8_t> out = memory, expected_out = memory;
      const matrix data = random_matrix(random, shape.rows, shape.colsb);
      for (int row = 0; row < shape.rows; ++row) {
        std::memcpy(expected_out.data() + middle + row * stride,
                    &data.bytes[static_cast<size_t>(row * shape.colsb)],
                    static_cast<size_t>(shape.colsb));
      }
      load<0>(data.bytes.data(), shape.colsb);
      store<0>(out.data() + middle, stride);
      expect(out == expected_out, "TILESTORED by a stride, and nothing else");
    }
  }
}

// The last row ends where the next page, which is not there, begins; and so does the code.
void test_end_of_page() {
  constexpr size_t page = 4096;
  constexpr uint8_t code[] = {0xc4, 0xe2, 0x7b, 0x49, 0xc8, 0xc3};  // tilezero %tmm1; ret
  auto* pages = static_cast<uint8_t*>(mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE | PROT_EXEC,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(pages + page, page, PROT_NONE);
  load_config(shaped({{3, 20}, {1, 4}}));
  load<0>(pages + page - 2 * 64 - 20, 64);
  store<0>(pages + page - 2 * 64 - 20, 64);
  uint8_t* entry = pages + page - sizeof(code);
  std::memcpy(entry, code, sizeof(code));
  reinterpret_cast<void (*)()>(entry)();
  munmap(pages, 2 * page);
}

// Configurations.

tile_config store_config() {
  tile_config out = shaped({{1, 2}, {3, 4}, {5, 6}, {7, 8}, {9, 10}, {11, 12}, {13, 14}, {15, 16}});
  out.reserved_2[13] = out.reserved_2[0] = out.rows[15] = 1;
  _tile_storeconfig(&out);
  barrier();
  return out;
}

bool same(const tile_config& a, const tile_config& b) {
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

// Addresses other than the intrinsics'.
tile_config static_config, static_out;

void test_addresses_of_configurations(const tile_config& config) {
  static_config = config;
  barrier();
  asm volatile("ldtilecfg %1; sttilecfg %0" : "=m"(static_out) : "m"(static_config));
  expect(same(static_out, config), "configurations relative to RIP");

  tile_config out[2];
  asm volatile(
      "lea 0x1234567+9*8(%%rax), %%r8; mov $-9, %%rdx; ldtilecfg -0x1234567(%%r8,%%rdx,8);"
      "lea -64-16*4(%%rcx), %%r13; mov $16, %%r12; sttilecfg 64(%%r13,%%r12,4);"
      "mov %%rbp, %%rdx; lea 64(%%rcx), %%rbp; sttilecfg (%%rbp); mov %%rdx, %%rbp"
      :
      : "a"(&config), "c"(out)
      : "memory", "rdx", "r8", "r12", "r13");
  expect(same(out[0], config) && same(out[1], config), "configurations by scaled indices");
}

void test_configurations() {
  tile_config none;
  none.palette = 0;
  const tile_config ragged =
      shaped({{16, 64}, {1, 1}, {0, 0}, {7, 63}, {2, 4}, {3, 8}, {15, 60}, {5, 20}});
  load_config(ragged);
  expect(same(store_config(), ragged), "STTILECFG gives what LDTILECFG took");
  _tile_release();
  expect(same(store_config(), none), "STTILECFG after TILERELEASE");
  load_config(ragged);
  tile_config initial = ragged;
  initial.palette = 0;
  load_config(initial);
  expect(same(store_config(), none), "STTILECFG after palette 0");
  test_addresses_of_configurations(ragged);

  tile_config late = shaped({{6, 64}});
  late.start_row = 4;
  const matrix rows = filled(6, 64, 1);
  matrix expected(6, 64);
  for (size_t i = 4 * 64; i < 6 * 64; ++i) expected.bytes[i] = 1;
  load_config(late);
  expect(same(store_config(), late), "STTILECFG gives the start row");
  load<0>(rows.bytes.data(), 64);
  expect(store_config().start_row == 0, "a load ends the restart");
  expect(stored<0>(6, 64).bytes == expected.bytes, "a load begins at the start row");
  load_config(late);
  _tile_zero(0);
  expect(store_config().start_row == 0, "TILEZERO ends the restart");
  late = shaped({{16, 64}, {16, 64}, {16, 64}});
  late.start_row = 4;
  load_config(late);
  _tile_dpbuud(0, 1, 2);
  expect(store_config().start_row == 0, "a dot product ends the restart");
}

// Around the instructions.

void test_registers_survive() {
  load_config(shaped({{16, 64}}));
  const uint64_t before[2] = {0x0123456789abcdef, 0xfedcba9876543210};
  uint64_t after[2];
  uint8_t carry;
  asm volatile("movdqu %2, %%xmm7; stc; tilezero %%tmm0; setc %1; movdqu %%xmm7, %0"
               : "=m"(after), "=q"(carry)
               : "m"(before)
               : "xmm7", "cc");
  expect(carry == 1 && std::memcmp(before, after, sizeof(after)) == 0, "registers survive");
}

void test_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([i] {
      std::mt19937 random(static_cast<unsigned>(i));
      const matrix c = random_matrix(random, 3 + i, 64 - 4 * i);
      const matrix a = random_matrix(random, c.rows, 4 * (9 - i));
      const matrix b = random_matrix(random, 9 - i, c.colsb);
      matrix expected = c;
      load_config(shaped({c.shape(), a.shape(), b.shape()}));
      load<0>(c.bytes.data(), c.colsb);
      load<1>(a.bytes.data(), a.colsb);
      load<2>(b.bytes.data(), b.colsb);
      for (int repeat = 0; repeat < 200; ++repeat) {
        asm volatile("tdpbssd %%tmm2, %%tmm1, %%tmm0" ::);
        expected = model_bytes<int8_t, int8_t>(a, b, expected);
        std::this_thread::yield();
      }
      expect(stored<0>(c.rows, c.colsb).bytes == expected.bytes, "threads have tiles of their own");
      if (i % 2 == 0) _tile_release();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void test_counters() {
  uint64_t before[kt::amx_instruction_count];
  const auto count = [](int i) { return kt::amx_emulated(static_cast<amx_instruction>(i)); };
  for (int i = 0; i < kt::amx_instruction_count; ++i) before[i] = count(i);
  const matrix full(16, 64);
  multiply(amx_instruction::tdpbsud, full, full, full);
  const uint64_t expected[] = {1, 0, 1, 0, 2, 1, 1, 0, 1, 0, 0, 0};
  for (int i = 0; i < kt::amx_instruction_count; ++i) {
    expect(before[i] > 0, "every instruction was emulated");
    expect(count(i) - before[i] == expected[i], "each instruction is counted once");
  }
}

}  // namespace

tile_config shaped(std::initializer_list<tile_shape> shapes) {
  tile_config config;
  int t = 0;
  for (const tile_shape& shape : shapes) {
    config.rows[t] = static_cast<uint8_t>(shape.rows);
    config.colsb[t] = static_cast<uint16_t>(shape.colsb);
    ++t;
  }
  return config;
}

void load_config(const tile_config& config) {
  barrier();
  _tile_loadconfig(&config);
}

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what);
}

bool start_amx() {
  static const bool emulate = !machine_grants_amx();
  if (emulate) kt::install_amx_emulator();
  return emulate;
}

int run_tests() {
  // Sanitizers, too, may handle them.
  signal(SIGILL, SIG_DFL);
  signal(SIGSEGV, SIG_DFL);
  const bool emulated = start_amx();
  std::mt19937 random(1);
  test_faults(emulated);
  test_configurations();
  test_byte_products(random);
  test_bf16_products(random);
  test_bf16_pairs();
  test_bf16_is_fused();
  test_mxcsr_plays_no_part();
  test_tile<0>(random), test_tile<1>(random), test_tile<2>(random), test_tile<3>(random);
  test_tile<4>(random), test_tile<5>(random), test_tile<6>(random), test_tile<7>(random);
  test_strides(random);
  test_end_of_page();
  test_addresses(random);
  test_registers_survive();
  test_threads();
  if (emulated) test_counters();
  std::printf("AMX, %s - %s\n", emulated ? "emulated" : "on this machine's own AMX",
              failures ? "FAILED" : "passed");
  return failures ? 1 : 0;
}

}  // namespace kt_test

int main() { return kt_test::run_tests(); }
