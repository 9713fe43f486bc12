// Checks of arguments, with their messages.
#include "binding.h"

#include <cstdlib>

#include "thread_pool.h"

namespace nb = nanobind;

namespace kt {

void value_error(const std::string& message) { throw nb::value_error(message.c_str()); }

std::vector<isa> usable_isas(isa cap) {
  std::vector<isa> usable;
  for (int level = isa_count - 1; level >= 0; --level) {
    if (isa(level) <= cap && isa_supported(isa(level))) usable.push_back(isa(level));
  }
  return usable;
}

namespace {

isa find_isa(const std::string& wanted, const std::string& source, isa cap) {
  std::string names;
  for (isa level : usable_isas(cap)) {
    if (wanted == isa_name(level)) return level;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(level));
  }
  value_error(source + ": this process can use " + names);
}

}  // namespace

isa chosen_isa(const optional_isa& wanted) {
  isa cap = usable_isas(highest_isa).front();
  const char* variable = std::getenv("KTRANSFORMERS_ISA");
  if (variable && *variable) {
    cap = find_isa(variable, std::string("KTRANSFORMERS_ISA=") + variable, highest_isa);
  }
  return wanted ? find_isa(*wanted, "isa='" + *wanted + "'", cap) : cap;
}

int checked_threads(std::optional<int> threads) {
  const int count = threads ? *threads : default_threads();
  if (count < 1 || count > max_threads) {
    value_error("threads=" + std::to_string(count) + ": expected 1 to " +
                std::to_string(max_threads));
  }
  return count;
}

void check_size(const char* name, int64_t value, int64_t maximum) {
  if (value < 1 || value > maximum) {
    value_error(std::string(name) + "=" + std::to_string(value) + ": expected 1 to " +
                std::to_string(maximum));
  }
}

void check_matrix(int64_t n, int64_t k) {
  check_size("n", n, int64_t{1} << 30);
  check_size("k", k, gemm_max_k);
}

weight_format find_format(const std::string& name) {
  std::string names;
  for (weight_format format : weight_formats()) {
    if (name == format_name(format)) return format;
    names += (names.empty() ? "" : ", ") + format_name(format);
  }
  value_error("format '" + name + "': expected one of " + names);
}

element scale_element(weight_format format) {
  return scale_size(format) == 2 ? element::bf16 : element::fp32;
}

}  // namespace kt
