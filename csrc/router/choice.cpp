// choose_experts: a few hundred operations a token, in plain C++ for every machine.
#include <cmath>
#include <limits>

#include "router.h"

namespace kt {
namespace {

constexpr float lowest = -std::numeric_limits<float>::infinity();

// Whether a comes before b, which came first.
bool better(float a, float b) { return a > b || (a != a && b == b); }

void softmax(float* values, int64_t count) {
  float most = lowest;
  for (int64_t i = 0; i < count; ++i) {
    if (better(values[i], most)) most = values[i];
  }
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - most);
  for (int64_t i = 0; i < count; ++i) values[i] /= sum;
}

float group_score(scoring kind, const float* values, int64_t count) {
  float first = lowest, second = lowest;
  for (int64_t i = 0; i < count; ++i) {
    if (better(values[i], first)) {
      second = first;
      first = values[i];
    } else if (better(values[i], second)) {
      second = values[i];
    }
  }
  return kind == scoring::sigmoid ? first + second : first;
}

// Gives every expert outside of the best groups a score of its own, `outside`.
void keep_best_groups(const router_rule& rule, float outside, float* choice, float* group_scores) {
  const int64_t size = rule.experts / rule.groups;
  for (int64_t g = 0; g < rule.groups; ++g) {
    group_scores[g] = group_score(rule.kind, choice + g * size, size);
  }
  for (int64_t g = 0; g < rule.groups; ++g) {
    int64_t ahead = 0;
    for (int64_t other = 0; other < rule.groups; ++other) {
      const bool wins = other < g ? !better(group_scores[g], group_scores[other])
                                  : better(group_scores[other], group_scores[g]);
      ahead += other != g && wins;
    }
    if (ahead < rule.top_groups) continue;
    for (int64_t i = 0; i < size; ++i) choice[g * size + i] = outside;
  }
}

bool is_taken(const int32_t* index, int64_t count, int64_t expert) {
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] == expert) return true;
  }
  return false;
}

}  // namespace

void choose_experts(const router_rule& rule, float* logits, int32_t* index, float* weight) {
  const bool sigmoid = rule.kind == scoring::sigmoid;
  float* const scores = logits;
  float* const choice = logits + rule.experts;
  if (!sigmoid) softmax(scores, rule.experts);
  for (int64_t e = 0; e < rule.experts; ++e) {
    if (sigmoid) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    choice[e] = sigmoid ? scores[e] + rule.bias[e] : scores[e];
  }
  if (rule.top_groups < rule.groups) {
    // The groups' scores lie behind those of the experts.
    keep_best_groups(rule, sigmoid ? lowest : 0.0f, choice, choice + rule.experts);
  }
  float sum = 0.0f;
  for (int64_t slot = 0; slot < rule.top_k; ++slot) {
    int64_t best = -1;
    for (int64_t e = 0; e < rule.experts; ++e) {
      if ((best < 0 || better(choice[e], choice[best])) && !is_taken(index, slot, e)) best = e;
    }
    index[slot] = static_cast<int32_t>(best);
    weight[slot] = sigmoid ? scores[best] : choice[best];
    sum += weight[slot];
  }
  const float divisor = rule.normalise ? sum + 1e-20f : 1.0f;
  for (int64_t slot = 0; slot < rule.top_k; ++slot) {
    weight[slot] = weight[slot] / divisor * rule.scaling;
  }
}

}  // namespace kt
