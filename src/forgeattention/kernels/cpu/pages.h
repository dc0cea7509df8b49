// Reading page tables.
#pragma once

#include "ops.h"

namespace forge {

// Length of a row after checking it and its page offsets. Throws std::invalid_argument.
int row_length(const char* op, const Codec&, const Table&, int row);
// Records of `count` pages of a row from page `first` on.
void row_records(const Codec&, const Table&, int row, int head, int first, int count, const uint8_t** out);

}  // namespace forge
