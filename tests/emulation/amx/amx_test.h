// What the files of amx_emulator_test share.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <random>

namespace kt_test {

// The operand of LDTILECFG.
struct tile_config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved_2[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(tile_config) == 64);

struct tile_shape {
  int rows, colsb;
};

// The first tiles in these shapes, the others unused.
tile_config shaped(std::initializer_list<tile_shape> shapes);

void load_config(const tile_config& config);

void expect(bool holds, const char* what);

// Lets AMX instructions run: by the machine's own AMX if it has that and Linux grants it, else by
// the emulator. True for the emulator.
bool start_amx();

void test_addresses(std::mt19937& random);
void test_faults(bool emulated);

}  // namespace kt_test
