// The layer on every usable instruction set, thread count and from several callers at once, against
// the portable kernels on one thread, bit for bit. No Python: made for sanitizers.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "experts/experts.h"
#include "mla/mla.h"
#include "numa_memory.h"
#include "thread_pool.h"
#include "topology.h"
#include "weights/pack.h"

namespace {

using kt::isa;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what);
}

struct layer {
  kt::weight_format format;
  int64_t experts, d, f;
  std::vector<char> gate_up, gate_up_scale, down, down_scale;

  kt::experts_weights weights() const {
    return {format,
            experts,
            d,
            f,
            kt::in_one_part({gate_up.data(), gate_up_scale.data()}, kt::padded_n(f)),
            kt::in_one_part({down.data(), down_scale.data()}, kt::padded_n(d))};
  }
};

struct request {
  int64_t tokens, top_k;
  std::vector<float> x, weight;
  std::vector<int64_t> index;
};

std::vector<float> normal(std::mt19937& random, int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = distribution(random);
  return values;
}

void pack_into(kt::weight_format format, std::mt19937& random, int64_t n, int64_t k,
               std::vector<char>* packed, std::vector<char>* scale) {
  const std::vector<float> weight = normal(random, n * k);
  const size_t begin = packed->size(), scale_begin = scale->size();
  packed->resize(begin + static_cast<size_t>(kt::packed_bytes(format, n, k)));
  scale->resize(scale_begin +
                static_cast<size_t>(kt::scale_count(format, n, k) * kt::scale_size(format)));
  const kt::kernel_table kernels = kt::select_kernels(isa(kt::isa_count - 1));
  const kt::non_finite found = kt::pack(kernels, format, weight.data(), kt::float_type::fp32, n, k,
                                        packed->data() + begin, scale->data() + scale_begin);
  expect(found.count == 0, "finite weights are reported as finite");
}

layer make_layer(std::mt19937& random, kt::weight_format format, int64_t experts, int64_t d,
                 int64_t f) {
  layer made{format, experts, d, f, {}, {}, {}, {}};
  for (int64_t e = 0; e < experts; ++e) {
    for (int half = 0; half < 2; ++half) {
      pack_into(format, random, f, d, &made.gate_up, &made.gate_up_scale);
    }
    pack_into(format, random, d, f, &made.down, &made.down_scale);
  }
  return made;
}

request make_request(std::mt19937& random, const layer& of, int64_t tokens, int64_t top_k) {
  request made{tokens, top_k, normal(random, tokens * of.d), normal(random, tokens * top_k), {}};
  std::uniform_int_distribution<int64_t> any_expert(0, of.experts);  // the last one skips the slot
  for (int64_t i = 0; i < tokens * top_k; ++i) made.index.push_back(any_expert(random));
  return made;
}

std::vector<float> forward(const kt::experts_weights& on, const request& of, isa level,
                           int threads) {
  std::vector<float> out(static_cast<size_t>(of.tokens * on.hidden_size), -1.0f);
  const kt::experts_input input{{of.tokens, of.top_k, of.index.data(), kt::index_type::int64,
                                 of.weight.data(), kt::float_type::fp32},
                                of.x.data(),
                                out.data(),
                                kt::float_type::fp32};
  const int64_t step = kt::max_chunk_tokens(of.top_k);
  const kt::kernel_table kernels = kt::select_kernels(level);
  for (int64_t begin = 0; begin < of.tokens; begin += step) {
    const int64_t count = of.tokens - begin < step ? of.tokens - begin : step;
    kt::experts_forward(kernels, on, input, begin, count, threads);
  }
  return out;
}

std::vector<float> forward(const layer& on, const request& of, isa level, int threads) {
  return forward(on.weights(), of, level, threads);
}

using memories = std::vector<std::vector<char>>;

// Copies what parts hold of `matrices` matrices with outputs of `size` bytes, padded to `outputs`.
memories cut(const std::vector<kt::numa_part>& plan, const std::vector<char>& whole,
             int64_t matrices, int64_t outputs, int64_t size) {
  memories parts;
  for (const kt::numa_part& part : plan) {
    std::vector<char> memory;
    for (int64_t matrix = 0; matrix < matrices; ++matrix) {
      const auto first = whole.begin() + (matrix * outputs + part.first_output) * size;
      memory.insert(memory.end(), first, first + part.outputs * size);
    }
    parts.push_back(memory);
  }
  return parts;
}

// A weight of matrices with n outputs and k inputs on nodes; its parts are appended to `memory`.
kt::placed_weight place(kt::numa_mode mode, const std::vector<int>& nodes, kt::weight_format format,
                        const std::vector<char>& packed, const std::vector<char>& scale,
                        int64_t matrices, int64_t n, int64_t k, std::vector<memories>* memory) {
  const int64_t outputs = kt::padded_n(n), panel = kt::numa_panel_outputs;
  const std::vector<kt::numa_part> plan = kt::plan_numa(mode, nodes, {matrices, outputs, 1});
  const int64_t bytes = kt::packed_bytes(format, panel, k) / panel;
  const int64_t scale_bytes = kt::scale_count(format, panel, k) * kt::scale_size(format) / panel;
  memory->push_back(cut(plan, packed, matrices, outputs, bytes));
  memory->push_back(cut(plan, scale, matrices, outputs, scale_bytes));
  kt::placed_weight weight{{}, mode == kt::numa_mode::replicate};
  for (size_t i = 0; i < plan.size(); ++i) {
    const char* const at = (*memory)[memory->size() - 2][i].data();
    const char* const scale_at = memory->back()[i].data();
    weight.parts.push_back(
        {plan[i].nodes.front(), plan[i].first_output, plan[i].outputs, {at, scale_at}});
  }
  return weight;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<isa> usable() {
  std::vector<isa> levels;
  for (int level = 0; level < kt::isa_count; ++level) {
    if (kt::isa_supported(isa(level))) levels.push_back(isa(level));
  }
  return levels;
}

// The levels that have a matrix product of their own for the format: others repeat one of these.
std::vector<isa> usable_for(kt::weight_format format) {
  std::vector<isa> levels;
  for (isa level : usable()) {
    if (kt::selected_isa(kt::product_of(format), level) == level) levels.push_back(level);
  }
  return levels;
}

// What a level must equal: portable to the bit, or with bf16 weights its own single thread.
isa reference_level(kt::weight_format format, isa level) {
  return format.kind == kt::weight_kind::bf16 ? level : isa::portable;
}

void test_every_isa_and_thread_count(std::mt19937& random, kt::weight_format format) {
  const int64_t sizes[][3] = {{1, 1, 1}, {3, 100, 50}, {8, 64, 32}, {5, 129, 65}, {4, 256, 160}};
  const int64_t token_counts[] = {1, 2, 7, 33, 70};
  for (const auto& size : sizes) {
    const layer made = make_layer(random, format, size[0], size[1], size[2]);
    for (int64_t tokens : token_counts) {
      const request asked = make_request(random, made, tokens, 1 + tokens % 4);
      for (isa level : usable_for(format)) {
        const std::vector<float> expected = forward(made, asked, reference_level(format, level), 1);
        for (int threads : {1, 2, 4}) {
          expect(same_bits(forward(made, asked, level, threads), expected), kt::isa_name(level));
        }
      }
    }
  }
}

void test_more_than_one_chunk(std::mt19937& random, kt::weight_format format) {
  const layer made = make_layer(random, format, 2, 16, 8);
  const request asked = make_request(random, made, 1025, 1);
  for (isa level : usable_for(format)) {
    const std::vector<float> expected = forward(made, asked, reference_level(format, level), 1);
    expect(same_bits(forward(made, asked, level, 3), expected), "two chunks");
  }
}

// Two sequences of 5 queries for each head in pages of 16 tokens, the last of them not full, with
// holes.
void test_attention(std::mt19937& random, kt::weight_format format, kt::latent_type cached,
                    int64_t heads, int64_t latent) {
  const int64_t rope = 8, nope = 24, value = 40, page = 16, tokens = 5;
  std::vector<char> uk, uk_scale, uv, uv_scale;
  for (int64_t h = 0; h < heads; ++h) {
    pack_into(format, random, latent, nope, &uk, &uk_scale);
    pack_into(format, random, value, latent, &uv, &uv_scale);
  }
  const kt::mla_weights weights{format,
                                heads,
                                latent,
                                rope,
                                nope,
                                value,
                                {uk.data(), uk_scale.data()},
                                {uv.data(), uv_scale.data()}};
  const std::vector<int32_t> table{9,  0,  1,  8,  7,  2,  3,  4,  5,  6,
                                   10, 11, 12, 13, 14, 15, 16, 17, 18, 19};
  const std::vector<int32_t> lengths{150, 7};
  std::vector<uint8_t> valid(2 * 150, 1);
  for (size_t i = 0; i < valid.size(); i += 7) valid[i] = 0;
  const std::vector<float> q = normal(random, 2 * tokens * heads * (nope + rope));
  const std::vector<float> c = normal(random, 20 * page * latent);
  const std::vector<int8_t> integers(c.begin(), c.end());
  const std::vector<float> scale = normal(random, 20 * page * kt::latent_groups(latent));
  const bool is_int8 = cached == kt::latent_type::int8;
  const std::vector<float> r = normal(random, 20 * page * rope);
  std::vector<float> out(static_cast<size_t>(2 * tokens * heads * value));
  const kt::mla_input input{
      2,
      tokens,
      q.data(),
      out.data(),
      kt::float_type::fp32,
      0.2f,
      {page, is_int8 ? static_cast<const void*>(integers.data()) : c.data(), cached,
       is_int8 ? scale.data() : nullptr, r.data(), kt::float_type::fp32, table.data(), 10,
       lengths.data(), valid.data(), 150}};
  for (kt::mla_form form : {kt::mla_form::absorbed, kt::mla_form::expanded}) {
    for (isa level : usable_for(format)) {
      std::vector<float> expected;
      for (int threads : {1, 2, 4}) {
        std::fill(out.begin(), out.end(), -1.0f);
        for (int64_t sequence = 0; sequence < input.batch;) {
          const kt::mla_chunk chunk = kt::mla_chunk_at(weights, input, form, sequence, 0);
          kt::mla_forward(kt::select_kernels(level), weights, input, chunk, threads);
          sequence += chunk.sequences;
        }
        if (expected.empty()) expected = out;
        expect(same_bits(out, expected), "attention does not depend on threads");
      }
    }
  }
}

void test_concurrent_callers(std::mt19937& random) {
  const layer made = make_layer(random, {kt::weight_kind::int4, 32}, 8, 96, 64);
  const request asked = make_request(random, made, 40, 3);
  const std::vector<float> expected = forward(made, asked, isa::portable, 1);
  const isa best = usable().back();
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        const int threads = 1 + (caller + repeat) % 4;
        if (!same_bits(forward(made, asked, best, threads), expected)) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  expect(wrong == 0, "concurrent callers");
}

// A layer in parts on nodes, real and not, gives the bits of one in one part.
void test_parts(std::mt19937& random, kt::weight_format format) {
  const layer made = make_layer(random, format, 5, 200, 100);
  for (int64_t tokens : {1, 40}) {
    const request asked = make_request(random, made, tokens, 3);
    const std::vector<float> expected = forward(made, asked, usable().back(), 1);
    for (kt::numa_mode mode : {kt::numa_mode::shard, kt::numa_mode::replicate}) {
      for (const std::vector<int>& nodes : {std::vector{0}, {7, 0}, {3, 4, 5}, {0, 1, 2, 3, 4}}) {
        std::vector<memories> memory;
        kt::experts_weights placed = made.weights();
        placed.gate_up = place(mode, nodes, format, made.gate_up, made.gate_up_scale,
                               2 * made.experts, made.f, made.d, &memory);
        placed.down = place(mode, nodes, format, made.down, made.down_scale, made.experts, made.d,
                            made.f, &memory);
        for (int threads : {1, 2, 4}) {
          expect(same_bits(forward(placed, asked, usable().back(), threads), expected), "parts");
        }
      }
    }
  }
}

// A worker takes the tasks of its node's group while there are any, and every task runs once.
void test_groups_are_taken_by_their_nodes_first() {
  constexpr int64_t tasks = 500;
  struct shared {
    std::vector<kt::task_group> groups{{kt::max_numa_nodes, tasks}, {kt::max_numa_nodes + 1, 0}};
    std::atomic<int64_t> begun[kt::max_task_groups];
    std::atomic<int> runs[kt::max_task_groups * tasks];
    int threads, real_nodes = 0;
    std::atomic<int> strangers{0};
  };
  const auto run = [](void* context, int64_t task, int worker) {
    shared* all = static_cast<shared*>(context);
    ++all->runs[task];
    int64_t group = task < tasks ? 0 : 1 + task / tasks;
    ++all->begun[group];
    // The calling thread may have moved to another node since it asked.
    if (worker == 0 && all->real_nodes > 1) return;
    for (size_t own = 2; own < all->groups.size(); ++own) {
      if (all->groups[own].node != kt::worker_node(worker) || own == static_cast<size_t>(group)) {
        continue;
      }
      // Those that others have claimed may not have begun.
      if (all->begun[own] < tasks - (all->threads - 1)) ++all->strangers;
    }
  };
  for (int threads : {2, 4}) {
    shared all;
    all.threads = threads;
    for (int node : kt::numa_nodes(kt::read_topology(), kt::numa_mode::shard)) {
      all.groups.push_back({node, tasks});
      ++all.real_nodes;
    }
    for (auto& count : all.begun) count = 0;
    for (auto& count : all.runs) count = 0;
    const int64_t total = tasks * (1 + all.real_nodes);
    const kt::phase phases[] = {
        {total, run, &all, all.groups.data(), static_cast<int>(all.groups.size())}};
    kt::run_phases(phases, 1, threads);
    for (int64_t task = 0; task < total; ++task) expect(all.runs[task] == 1, "a task of a group");
    expect(all.strangers == 0, "a worker's own group comes first");
  }
}

// Each task of a phase runs once, and sees all of the phase before.
void test_phases_are_ordered() {
  struct counters {
    std::atomic<int> first{0}, second{0}, out_of_order{0};
  };
  for (int repeat = 0; repeat < 2000; ++repeat) {
    counters seen;
    const kt::phase phases[] = {
        {17, [](void* c, int64_t, int) { ++static_cast<counters*>(c)->first; }, &seen},
        {0, [](void* c, int64_t, int) { ++static_cast<counters*>(c)->out_of_order; }, &seen},
        {23,
         [](void* c, int64_t, int) {
           counters* all = static_cast<counters*>(c);
           if (all->first != 17) ++all->out_of_order;
           ++all->second;
         },
         &seen}};
    kt::run_phases(phases, 3, 1 + repeat % 5);
    expect(seen.first == 17 && seen.second == 23 && seen.out_of_order == 0, "phases");
  }
}

// Whatever throws, in the calling thread or a worker, in any phase: the caller gets the first
// exception, nothing that has not begun does, and the pool works on.
void test_exceptions_reach_the_caller() {
  struct plan {
    int64_t failing_phase;
    int64_t failing_task;
    std::atomic<int> behind{0};

    void run(int64_t phase, int64_t task) {
      if (phase > failing_phase) ++behind;
      if (phase == failing_phase && task >= failing_task) throw std::bad_alloc();
    }
  };
  for (int repeat = 0; repeat < 600; ++repeat) {
    plan work{repeat % 4, repeat % 17};  // the phase after the last: nothing fails
    const kt::phase phases[] = {
        {17, [](void* c, int64_t task, int) { static_cast<plan*>(c)->run(0, task); }, &work},
        {17, [](void* c, int64_t task, int) { static_cast<plan*>(c)->run(1, task); }, &work},
        {17, [](void* c, int64_t task, int) { static_cast<plan*>(c)->run(2, task); }, &work}};
    bool caught = false;
    try {
      kt::run_phases(phases, 3, 1 + repeat % 5);
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    expect(caught == (repeat % 4 < 3), "an exception in a task reaches the caller");
    expect(work.behind == 0, "no phase begins after a failure");
  }
}

// Whether a worker is held to a node or runs anywhere, it is on one that exists.
void test_workers_know_their_node() {
  struct seen_nodes {
    const kt::topology machine = kt::read_topology();
    std::atomic<int> unknown{0};
  } seen;
  for (int threads : {1, 2, seen.machine.threads, 6}) {
    const kt::phase phases[] = {{64,
                                 [](void* c, int64_t, int worker) {
                                   seen_nodes* all = static_cast<seen_nodes*>(c);
                                   const int node = kt::worker_node(worker);
                                   bool known = false;
                                   for (const kt::core& one : all->machine.cores) {
                                     known |= one.node == node;
                                   }
                                   if (!known) ++all->unknown;
                                 },
                                 &seen}};
    kt::run_phases(phases, 1, threads);
  }
  expect(seen.unknown == 0, "a worker's node");
}

#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer does not support threads after fork
void test_fork(std::mt19937& random) {
  const layer made = make_layer(random, {kt::weight_kind::int8, 0}, 4, 64, 32);
  const request asked = make_request(random, made, 9, 2);
  const std::vector<float> expected = forward(made, asked, isa::portable, 2);
  const pid_t child = fork();
  if (child == 0) _exit(same_bits(forward(made, asked, isa::portable, 2), expected) ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the pool works after fork");
}
#endif

}  // namespace

int main() {
  std::mt19937 random(1);
  test_workers_know_their_node();
  test_phases_are_ordered();
  test_groups_are_taken_by_their_nodes_first();
  test_exceptions_reach_the_caller();
  for (kt::weight_format format : kt::weight_formats()) {
    test_every_isa_and_thread_count(random, format);
    test_more_than_one_chunk(random, format);
    test_parts(random, format);
    test_attention(random, format, kt::latent_type::fp32, 3, 48);
  }
  // A block of queries and one, a group of latents and the rest.
  test_attention(random, {kt::weight_kind::bf16, 0}, kt::latent_type::int8, 13, 136);
  test_concurrent_callers(random);
#if !defined(__SANITIZE_THREAD__)
  test_fork(random);
#endif
  for (isa level : usable()) std::printf("%s ", kt::isa_name(level));
  std::printf("- %s\n", failures ? "FAILED" : "passed");
  return failures ? 1 : 0;
}
