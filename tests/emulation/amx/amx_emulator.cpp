// The handler's only lasting state are the counters and one block of tiles per thread, mapped when
// the thread first configures it and unmapped when it ends. It hangs on a pthread key, not on a
// thread_local: 8 KiB of initial-exec TLS do not fit in what glibc spares for libraries that are
// loaded late, and other TLS may allocate. pthread_getspecific is async-signal-safe in glibc;
// pthread_setspecific may allocate, which an instruction of a kernel never interrupts.
#include "amx_emulator.h"

#include <emmintrin.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#include "amx_decode.h"

namespace kt {
namespace {

// Palette 1, the only one.
constexpr int tile_count = 8;
constexpr int max_rows = 16;
constexpr int max_colsb = 64;

// A test build swaps the sources of every dot product: tests of kernels must notice.
constexpr bool swap_sources = KT_AMX_SWAP_SOURCES;

// The operand of LDTILECFG and STTILECFG.
struct tile_config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved_2[14];
  uint16_t colsb[tile_count];
  uint8_t reserved_32[16];
  uint8_t rows[tile_count];
  uint8_t reserved_56[8];
};
static_assert(sizeof(tile_config) == 64);

// Zero beyond the configured rows and columns: LDTILECFG clears, and nothing writes there.
struct tile {
  uint8_t row[max_rows][max_colsb];
};

// All zero is the architecture's initial state.
struct tile_state {
  tile_config config;
  tile tiles[tile_count];
};

std::atomic<uint64_t> emulated[amx_instruction_count];
static_assert(std::atomic<uint64_t>::is_always_lock_free);
pthread_key_t state_key;
struct sigaction previous;

template <typename T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

[[noreturn]] void die(const char* why) {
  // Nothing else can be done if this write fails.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, why, std::strlen(why));
  std::abort();
}

// A real general-protection fault (this address is not canonical), not a signal sent to oneself:
// the kernel then treats a blocked or ignored SIGSEGV as it does after the instruction itself.
[[noreturn]] void raise_general_protection() {
  uint8_t unused;
  for (;;) asm volatile("movb (%1), %0" : "=q"(unused) : "r"(uint64_t{1} << 63) : "memory");
}

// This thread's tiles; null, which stands for the initial state, if it has none yet.
tile_state* find_state() { return static_cast<tile_state*>(pthread_getspecific(state_key)); }

void unmap_state(void* state) { munmap(state, sizeof(tile_state)); }

tile_state& find_or_map_state() {
  if (tile_state* state = find_state()) return *state;
  void* mapped =
      mmap(nullptr, sizeof(tile_state), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED || pthread_setspecific(state_key, mapped) != 0) {
    die("AMX emulator: no memory for a thread's tiles\n");
  }
  return *static_cast<tile_state*>(mapped);
}

template <size_t size>
bool all_zero(const uint8_t (&bytes)[size]) {
  for (uint8_t byte : bytes) {
    if (byte != 0) return false;
  }
  return true;
}

// For palette 0 nothing else is looked at.
bool valid(const tile_config& config) {
  if (config.palette == 0) return true;
  if (config.palette != 1 || !all_zero(config.reserved_2) || !all_zero(config.reserved_32) ||
      !all_zero(config.reserved_56)) {
    return false;
  }
  for (int t = 0; t < tile_count; ++t) {
    const int rows = config.rows[t], colsb = config.colsb[t];
    if (rows > max_rows || colsb > max_colsb || (rows == 0) != (colsb == 0)) return false;
  }
  return true;
}

void load_config(const amx_decoded& in) {
  const auto* from = reinterpret_cast<const uint8_t*>(in.base + in.scaled_index);
  const auto config = read<tile_config>(from);
  if (!valid(config)) raise_general_protection();
  tile_state& state = find_or_map_state();
  std::memset(&state, 0, sizeof(state));
  if (config.palette != 0) state.config = config;
}

void store_config(const amx_decoded& in) {
  const tile_state* state = find_state();
  const tile_config config = state ? state->config : tile_config{};
  std::memcpy(reinterpret_cast<void*>(in.base + in.scaled_index), &config, sizeof(config));
}

// False also for every tile of the initial state, where TILES_CONFIGURED is 0.
bool usable(const tile_config& config, int number) {
  return number < tile_count && config.rows[number] != 0;
}

// AMX-E3.
bool movable(const tile_config& config, int number) {
  return usable(config, number) && config.colsb[number] % 4 == 0 &&
         config.start_row < config.rows[number];
}

// A fault in a row leaves its number in start_row.
void load_tile(tile_state& state, const amx_decoded& in) {
  tile& to = state.tiles[in.reg];
  uint8_t& row = state.config.start_row;
  std::memset(to.row[row], 0, static_cast<size_t>(max_rows - row) * max_colsb);
  for (; row < state.config.rows[in.reg]; ++row) {
    std::memcpy(to.row[row], reinterpret_cast<const void*>(in.base + row * in.scaled_index),
                state.config.colsb[in.reg]);
  }
  row = 0;
}

void store_tile(tile_state& state, const amx_decoded& in) {
  const tile& from = state.tiles[in.reg];
  uint8_t& row = state.config.start_row;
  for (; row < state.config.rows[in.reg]; ++row) {
    std::memcpy(reinterpret_cast<void*>(in.base + row * in.scaled_index), from.row[row],
                state.config.colsb[in.reg]);
  }
  row = 0;
}

// AMX-E4, for dst += src1 * src2.
bool multipliable(const tile_config& config, const amx_decoded& in) {
  const int dst = in.reg, src1 = in.rm, src2 = in.vvvv;
  if (dst == src1 || dst == src2 || src1 == src2) return false;
  for (int number : {dst, src1, src2}) {
    if (!usable(config, number) || config.colsb[number] % 4 != 0) return false;
  }
  return config.colsb[dst] == config.colsb[src2] && config.rows[dst] == config.rows[src1] &&
         config.colsb[src1] / 4 == config.rows[src2];
}

// T1 and T2: int8_t or uint8_t. Sums wrap around.
template <typename T1, typename T2>
void dot_bytes(tile& dst, const tile& src1, const tile& src2, int m, int n, int k) {
  for (int i = 0; i < m; ++i) {
    uint32_t sums[max_colsb / 4];
    std::memcpy(sums, dst.row[i], sizeof(sums));
    for (int l = 0; l < k; ++l) {
      for (int j = 0; j < n; ++j) {
        int32_t sum = 0;
        for (int byte = 0; byte < 4; ++byte) {
          sum += static_cast<T1>(src1.row[i][4 * l + byte]) *
                 static_cast<T2>(src2.row[l][4 * j + byte]);
        }
        sums[j] += static_cast<uint32_t>(sum);
      }
    }
    std::memcpy(dst.row[i], sums, sizeof(sums));
  }
}

float bf16(const uint8_t* bytes) {
  return std::bit_cast<float>(static_cast<uint32_t>(read<uint16_t>(bytes)) << 16);
}

// a * b + c, rounded once. The product of two bf16 is exact in double, and twice 24 bits and two
// more make the double's rounding innocuous (Figueroa, "When is double rounding innocuous?", 1995).
float fused(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) +
                            static_cast<double>(c));
}

// Never inlined: its arithmetic must not move before the change of MXCSR.
[[gnu::noinline]] void dot_bf16(tile& dst, const tile& src1, const tile& src2, int m, int n,
                                int k) {
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float even = 0, odd = 0;
      for (int l = 0; l < k; ++l) {
        const uint8_t* a = &src1.row[i][4 * l];
        const uint8_t* b = &src2.row[l][4 * j];
        even = fused(bf16(a), bf16(b), even);
        odd = fused(bf16(a + 2), bf16(b + 2), odd);
      }
      const float pairs = even + odd;
      const float sum = read<float>(&dst.row[i][4 * j]) + pairs;
      std::memcpy(&dst.row[i][4 * j], &sum, sizeof(sum));
    }
  }
}

void multiply(tile_state& state, const amx_decoded& in) {
  tile& dst = state.tiles[in.reg];
  const tile* src1 = &state.tiles[in.rm];
  const tile* src2 = &state.tiles[in.vvvv];
  const int m = state.config.rows[in.reg], n = state.config.colsb[in.reg] / 4;
  const int k = state.config.rows[in.vvvv];
  if (swap_sources) std::swap(src1, src2);
  if (in.instruction == amx_instruction::tdpbssd) {
    dot_bytes<int8_t, int8_t>(dst, *src1, *src2, m, n, k);
  } else if (in.instruction == amx_instruction::tdpbsud) {
    dot_bytes<int8_t, uint8_t>(dst, *src1, *src2, m, n, k);
  } else if (in.instruction == amx_instruction::tdpbusd) {
    dot_bytes<uint8_t, int8_t>(dst, *src1, *src2, m, n, k);
  } else if (in.instruction == amx_instruction::tdpbuud) {
    dot_bytes<uint8_t, uint8_t>(dst, *src1, *src2, m, n, k);
  } else {
    constexpr unsigned masked = 0x1f80, flush_to_zero = 0x8000, denormals_are_zero = 0x0040;
    // And round to nearest even. The return from the handler restores what was set before.
    _mm_setcsr(masked | flush_to_zero | denormals_are_zero);
    dot_bf16(dst, *src1, *src2, m, n, k);
  }
  state.config.start_row = 0;
}

// The instructions that need a configuration; false is #UD.
bool run_on_tiles(const amx_decoded& in) {
  tile_state* state = find_state();
  if (!state) return false;
  switch (in.instruction) {
    case amx_instruction::tilezero:
      if (!usable(state->config, in.reg)) return false;
      std::memset(&state->tiles[in.reg], 0, sizeof(tile));
      state->config.start_row = 0;
      return true;
    case amx_instruction::tileloadd:
    case amx_instruction::tileloaddt1:
      if (!movable(state->config, in.reg)) return false;
      load_tile(*state, in);
      return true;
    case amx_instruction::tilestored:
      if (!movable(state->config, in.reg)) return false;
      store_tile(*state, in);
      return true;
    default:
      if (!multipliable(state->config, in)) return false;
      multiply(*state, in);
      return true;
  }
}

// False if this is #UD, or nothing of ours.
bool emulate(ucontext_t& context) {
  amx_decoded in;
  if (!decode_amx(context, in)) return false;
  if (in.instruction == amx_instruction::ldtilecfg) {
    load_config(in);
  } else if (in.instruction == amx_instruction::sttilecfg) {
    store_config(in);
  } else if (in.instruction == amx_instruction::tilerelease) {
    if (tile_state* state = find_state()) std::memset(state, 0, sizeof(*state));
  } else if (!run_on_tiles(in)) {
    return false;
  }
  context.uc_mcontext.gregs[REG_RIP] = static_cast<greg_t>(in.next_rip);
  emulated[static_cast<int>(in.instruction)].fetch_add(1, std::memory_order_relaxed);
  return true;
}

// As if the previous handler had been called by the kernel.
void pass_on(int number, siginfo_t* info, void* context) {
  const bool sent = info->si_code <= 0;  // by kill() and the like, not by an instruction
  const bool ignored = previous.sa_handler == SIG_IGN;
  if (ignored && sent) return;
  if (ignored || previous.sa_handler == SIG_DFL) {
    // On return the instruction faults again, and the process dies of it, there.
    signal(number, SIG_DFL);
    if (sent) raise(number);
    return;
  }
  const struct sigaction handler = previous;
  if (handler.sa_flags & SA_RESETHAND) previous.sa_handler = SIG_DFL;
  // The return from this handler restores the mask of the interrupted code.
  pthread_sigmask(SIG_BLOCK, &handler.sa_mask, nullptr);
  if (handler.sa_flags & SA_NODEFER) {
    sigset_t self;
    sigemptyset(&self);
    sigaddset(&self, number);
    pthread_sigmask(SIG_UNBLOCK, &self, nullptr);
  }
  if (handler.sa_flags & SA_SIGINFO) {
    handler.sa_sigaction(number, info, context);
  } else {
    handler.sa_handler(number);
  }
}

void on_sigill(int number, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  auto& interrupted = *static_cast<ucontext_t*>(context);
  if (info->si_code <= 0 || !emulate(interrupted)) {
    pass_on(number, info, context);
  } else {
    // A signal costs more than most instructions. One that fails here faults again, by itself.
    while (emulate(interrupted)) continue;
  }
  errno = saved_errno;
}

std::mutex install_mutex;
bool installed = false, has_key = false;

}  // namespace

void install_amx_emulator() {
  const std::lock_guard lock(install_mutex);
  if (installed) return;
  if (!has_key && pthread_key_create(&state_key, unmap_state) != 0) {
    die("AMX emulator: pthread_key_create failed\n");
  }
  has_key = true;
  // Read first: the handler may run before the second call returns.
  sigaction(SIGILL, nullptr, &previous);
  struct sigaction action = {};
  action.sa_sigaction = on_sigill;
  action.sa_flags = SA_SIGINFO | (previous.sa_flags & SA_ONSTACK);
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, &action, nullptr);
  installed = true;
}

bool uninstall_amx_emulator() {
  const std::lock_guard lock(install_mutex);
  struct sigaction current = {};
  sigaction(SIGILL, nullptr, &current);
  if (!installed || !(current.sa_flags & SA_SIGINFO) || current.sa_sigaction != on_sigill) {
    return false;
  }
  sigaction(SIGILL, &previous, nullptr);
  installed = false;
  return true;
}

uint64_t amx_emulated(amx_instruction instruction) {
  return emulated[static_cast<int>(instruction)].load(std::memory_order_relaxed);
}

}  // namespace kt
