// What ends in a signal: each case in a process of its own. The expectations are those of a
// processor with AMX under Linux: #UD is SIGILL, #GP and page faults are SIGSEGV.
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>

#include "amx_emulator.h"
#include "amx_test.h"

namespace kt_test {
namespace {

constexpr int no_signal = 0;
alignas(64) uint8_t memory[1024];

// In a child process `run` must end in this signal; no_signal: come to its end.
void expect_end(int signal_number, const char* what, void (*run)()) {
  const pid_t child = fork();
  if (child == 0) {
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    run();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  const int ended_by = WIFSIGNALED(status) ? WTERMSIG(status) : no_signal;
  expect(ended_by == signal_number && (WIFSIGNALED(status) || WEXITSTATUS(status) == 0), what);
}

void expect_configuration(int signal_number, const char* what, const tile_config& config) {
  static tile_config tried;
  tried = config;
  expect_end(signal_number, what, [] { load_config(tried); });
}

void test_configurations() {
  const tile_config good = shaped({{16, 64}, {1, 1}});
  expect_configuration(no_signal, "a good configuration", good);
  for (int palette : {2, 3, 255}) {
    tile_config config = good;
    config.palette = static_cast<uint8_t>(palette);
    expect_configuration(SIGSEGV, "an unknown palette", config);
  }
  for (uint8_t offset = 2; offset < 64; ++offset) {
    if ((offset >= 16 && offset < 32) || (offset >= 48 && offset < 56)) continue;
    tile_config config = good;
    reinterpret_cast<uint8_t*>(&config)[offset] = 1;
    expect_configuration(SIGSEGV, "a reserved byte", config);
    config.palette = 0;
    expect_configuration(no_signal, "a reserved byte in palette 0", config);
  }
  expect_configuration(SIGSEGV, "17 rows", shaped({{17, 64}}));
  expect_configuration(SIGSEGV, "65 bytes per row", shaped({{16, 65}}));
  expect_configuration(SIGSEGV, "320 bytes per row", shaped({{16, 320}}));
  expect_configuration(SIGSEGV, "rows without columns", shaped({{16, 64}, {1, 0}}));
  expect_configuration(SIGSEGV, "columns without rows", shaped({{16, 64}, {0, 1}}));
  expect_end(SIGSEGV, "a configuration at an address that is not canonical",
             [] { _tile_loadconfig(reinterpret_cast<const void*>(uint64_t{1} << 63)); });
}

void test_without_configuration() {
  expect_end(SIGILL, "TILEZERO, unconfigured", [] { _tile_zero(0); });
  expect_end(SIGILL, "TILELOADD, unconfigured", [] { _tile_loadd(0, memory, 64); });
  expect_end(SIGILL, "TILELOADDT1, unconfigured", [] { _tile_stream_loadd(0, memory, 64); });
  expect_end(SIGILL, "TILESTORED, unconfigured", [] { _tile_stored(0, memory, 64); });
  expect_end(SIGILL, "TDPBSSD, unconfigured", [] { _tile_dpbssd(0, 1, 2); });
  expect_end(SIGILL, "TDPBF16PS, unconfigured", [] { _tile_dpbf16ps(0, 1, 2); });
  expect_end(no_signal, "TILERELEASE, unconfigured", [] { _tile_release(); });
  expect_end(SIGILL, "after TILERELEASE", [] {
    load_config(shaped({{16, 64}}));
    _tile_release();
    _tile_zero(0);
  });
  expect_end(SIGILL, "after palette 0", [] {
    load_config(shaped({{16, 64}}));
    tile_config none;
    none.palette = 0;
    load_config(none);
    _tile_zero(0);
  });
}

void test_one_tile() {
  expect_end(SIGILL, "TILEZERO of an unused tile", [] {
    load_config(shaped({{16, 64}}));
    _tile_zero(1);
  });
  expect_end(SIGILL, "TILELOADD of an unused tile", [] {
    load_config(shaped({{16, 64}}));
    _tile_loadd(7, memory, 64);
  });
  expect_end(no_signal, "TILEZERO of 63 bytes per row", [] {
    load_config(shaped({{16, 63}}));
    _tile_zero(0);
  });
  expect_end(SIGILL, "TILELOADD of 63 bytes per row", [] {
    load_config(shaped({{16, 63}}));
    _tile_loadd(0, memory, 64);
  });
  expect_end(SIGILL, "TILESTORED of 62 bytes per row", [] {
    load_config(shaped({{16, 62}}));
    _tile_stored(0, memory, 64);
  });
  expect_end(SIGILL, "a start row past the tile", [] {
    tile_config config = shaped({{4, 64}});
    config.start_row = 4;
    load_config(config);
    _tile_loadd(0, memory, 64);
  });
  expect_end(SIGSEGV, "TILELOADD from an address that is not canonical", [] {
    load_config(shaped({{1, 64}}));
    _tile_loadd(0, reinterpret_cast<const void*>(uint64_t{1} << 63), 64);
  });
}

// dst += src1 * src2 of tiles 0, 1 and 2.
template <int ssd>
void expect_product(int signal_number, const char* what, std::initializer_list<tile_shape> shapes) {
  static tile_config tried;
  tried = shaped(shapes);
  expect_end(signal_number, what, [] {
    load_config(tried);
    if (ssd) {
      _tile_dpbssd(0, 1, 2);
    } else {
      _tile_dpbf16ps(0, 1, 2);
    }
  });
}

template <int ssd>
void test_shapes_of_products() {
  expect_product<ssd>(no_signal, "a good product", {{3, 20}, {3, 28}, {7, 20}});
  expect_product<ssd>(SIGILL, "rows of destination and source 1", {{4, 20}, {3, 28}, {7, 20}});
  expect_product<ssd>(SIGILL, "columns of destination and source 2", {{3, 24}, {3, 28}, {7, 20}});
  expect_product<ssd>(SIGILL, "columns of source 1, rows of source 2", {{3, 20}, {3, 28}, {8, 20}});
  expect_product<ssd>(SIGILL, "unused destination", {{0, 0}, {3, 28}, {7, 20}});
  expect_product<ssd>(SIGILL, "unused source 1", {{3, 20}, {0, 0}, {7, 20}});
  expect_product<ssd>(SIGILL, "unused source 2", {{3, 20}, {3, 28}, {0, 0}});
  expect_product<ssd>(SIGILL, "columns that are no dwords", {{3, 22}, {3, 28}, {7, 22}});
  expect_product<ssd>(SIGILL, "source 1 of no dwords", {{3, 20}, {3, 30}, {7, 20}});
}

void configure_all() {
  const tile_shape full = {16, 64};
  load_config(shaped({full, full, full, full, full, full, full, full}));
}

// Encodings that no assembler makes; each is one bit or two from a good one.
void test_encodings() {
  expect_end(no_signal, "tdpbssd %tmm2, %tmm1, %tmm0", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x6b, 0x5e, 0xc1");
  });
  expect_end(SIGILL, "tdpbssd: destination is source 1", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x6b, 0x5e, 0xc0");
  });
  expect_end(SIGILL, "tdpbssd: destination is source 2", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x5e, 0xc1");
  });
  expect_end(SIGILL, "tdpbssd: source 1 is source 2", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc1");
  });
  expect_end(SIGILL, "tdpbssd: destination tmm8", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0x62, 0x6b, 0x5e, 0xc1");
  });
  expect_end(SIGILL, "tdpbssd: source 1 tmm9", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xc2, 0x6b, 0x5e, 0xc1");
  });
  expect_end(SIGILL, "tdpbssd: source 2 tmm10", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x2b, 0x5e, 0xc1");
  });
  expect_end(SIGILL, "tdpbssd with W1", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0xeb, 0x5e, 0xc1");
  });
  expect_end(SIGILL, "tdpbssd with L1", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x6f, 0x5e, 0xc1");
  });
  expect_end(no_signal, "tileloadd (%rax), %tmm0", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x20" ::"a"(memory) : "memory");
  });
  expect_end(SIGILL, "tileloadd without SIB", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x00" ::"a"(memory) : "memory");
  });
  expect_end(SIGILL, "tileloadd with VVVV", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x73, 0x4b, 0x04, 0x20" ::"a"(memory) : "memory");
  });
  expect_end(SIGILL, "tileloadd of tmm8", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0x62, 0x7b, 0x4b, 0x04, 0x20" ::"a"(memory) : "memory");
  });
  expect_end(SIGILL, "tileloadd behind LOCK", [] {
    configure_all();
    asm volatile(".byte 0xf0, 0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x20" ::"a"(memory) : "memory");
  });
  expect_end(no_signal, "sttilecfg (%rax)", [] {
    asm volatile(".byte 0xc4, 0xe2, 0x79, 0x49, 0x00" ::"a"(memory) : "memory");
  });
  expect_end(SIGILL, "sttilecfg with another digit", [] {
    asm volatile(".byte 0xc4, 0xe2, 0x79, 0x49, 0x08" ::"a"(memory) : "memory");
  });
  expect_end(SIGILL, "tilerelease with VVVV", [] {
    configure_all();
    asm volatile(".byte 0xc4, 0xe2, 0x70, 0x49, 0xc0");
  });
}

// ThreadSanitizer blocks every signal in a handler, SIGSEGV in the emulator's too.
#if !defined(__SANITIZE_THREAD__)
void test_refused_configuration() {
  expect_end(no_signal, "a refused configuration leaves the old one", [] {
    static tile_config tried = shaped({{16, 64}});
    load_config(tried);
    tried.palette = 2;
    struct sigaction skip = {};
    // A real processor and the emulator fault at different addresses: leave by a jump.
    static sigjmp_buf back;
    skip.sa_handler = [](int) { siglongjmp(back, 1); };
    sigaction(SIGSEGV, &skip, nullptr);
    if (sigsetjmp(back, 1) == 0) load_config(tried);
    tile_config stored;
    _tile_storeconfig(&stored);
    asm volatile("" ::: "memory");
    if (stored.palette != 1 || stored.rows[0] != 16) _exit(1);
  });
}

// The last rows lie in a page that the handler of SIGSEGV makes readable.
uint8_t* late_page;

void test_page_fault() {
  expect_end(no_signal, "a page fault in the middle of TILELOADD", [] {
    constexpr size_t page = 4096;
    auto* pages = static_cast<uint8_t*>(
        mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    uint8_t* rows = pages + page - 7 * 64;
    for (int i = 0; i < 1024; ++i) rows[i] = static_cast<uint8_t>(i % 251);
    late_page = pages + page;
    mprotect(late_page, page, PROT_NONE);
    struct sigaction give = {};
    give.sa_flags = SA_SIGINFO;
    give.sa_sigaction = [](int, siginfo_t* info, void*) {
      if (info->si_addr != late_page) _exit(2);
      mprotect(late_page, page, PROT_READ | PROT_WRITE);
    };
    sigaction(SIGSEGV, &give, nullptr);
    load_config(shaped({{16, 64}}));
    _tile_loadd(0, rows, 64);
    _tile_stored(0, memory, 64);
    asm volatile("" ::: "memory");
    if (std::memcmp(memory, rows, 1024) != 0) _exit(3);
  });
}
#endif

// Who handled SIGILL before gets whatever is no AMX.
volatile sig_atomic_t handled;

void skip_ud2(int, siginfo_t*, void* context) {
  handled = handled + 1;
  static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] += 2;
}

void start_over(const struct sigaction& action) {
  kt::uninstall_amx_emulator();
  sigaction(SIGILL, &action, nullptr);
  start_amx();
  start_amx();
}

void use_amx() {
  configure_all();
  _tile_zero(0);
  _tile_release();
}

void test_chain() {
  expect_end(no_signal, "a handler with context", [] {
    struct sigaction action = {};
    action.sa_sigaction = skip_ud2;
    action.sa_flags = SA_SIGINFO;
    start_over(action);
    use_amx();
    asm volatile("ud2");
    use_amx();
    asm volatile("ud2");
    if (handled != 2) _exit(1);
  });
  expect_end(no_signal, "a handler without context", [] {
    struct sigaction action = {};
    static sigjmp_buf back;
    action.sa_handler = [](int number) {
      sigset_t blocked;
      pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
      if (number != SIGILL || !sigismember(&blocked, SIGUSR1)) _exit(1);
      if (sigismember(&blocked, SIGILL)) _exit(2);
      siglongjmp(back, 1);
    };
    action.sa_flags = SA_NODEFER;
    sigaddset(&action.sa_mask, SIGUSR1);
    start_over(action);
    if (sigsetjmp(back, 1) == 0) {
      _tile_zero(0);
      _exit(3);
    }
    use_amx();
  });
  expect_end(SIGILL, "a handler that resets itself", [] {
    struct sigaction action = {};
    action.sa_sigaction = skip_ud2;
    action.sa_flags = static_cast<int>(SA_SIGINFO | SA_RESETHAND);
    start_over(action);
    asm volatile("ud2");
    if (handled != 1) _exit(1);
    asm volatile("ud2");
  });
  expect_end(no_signal, "a signal sent where an AMX instruction is next", [] {
    struct sigaction action = {};
    action.sa_handler = [](int) { handled = handled + 1; };
    start_over(action);
    configure_all();
    long number = SYS_tgkill;
    asm volatile("syscall; tilezero %%tmm0"
                 : "+a"(number)
                 : "D"(long{getpid()}), "S"(long{gettid()}), "d"(long{SIGILL})
                 : "rcx", "r11", "memory");
    if (number != 0 || handled != 1) _exit(1);
  });
  expect_end(SIGILL, "default, by an instruction", [] { asm volatile("ud2"); });
  expect_end(SIGILL, "default, sent", [] { raise(SIGILL); });
  expect_end(SIGILL, "ignored, by an instruction", [] {
    struct sigaction action = {};
    action.sa_handler = SIG_IGN;
    start_over(action);
    asm volatile("ud2");
  });
  expect_end(no_signal, "ignored, sent", [] {
    struct sigaction action = {};
    action.sa_handler = SIG_IGN;
    start_over(action);
    raise(SIGILL);
    use_amx();
  });
}

}  // namespace

void test_faults(bool emulated) {
  test_configurations();
  test_without_configuration();
  test_one_tile();
  test_shapes_of_products<1>();
  test_shapes_of_products<0>();
  test_encodings();
#if !defined(__SANITIZE_THREAD__)
  test_refused_configuration();
  test_page_fault();
#endif
  test_chain();
  if (emulated) {
    expect_end(SIGILL, "without the emulator", [] {
      if (!kt::uninstall_amx_emulator() || kt::uninstall_amx_emulator()) _exit(1);
      _tile_release();
    });
    expect_end(no_signal, "the handler is somebody else's by now", [] {
      signal(SIGILL, SIG_DFL);
      if (kt::uninstall_amx_emulator()) _exit(1);
    });
  }
}

}  // namespace kt_test
