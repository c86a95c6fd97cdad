// Where the byte strings of a msgpack array lie (https://github.com/msgpack/msgpack/blob/master/spec.md), without
// copying one or touching more of it than its header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cpr {

struct Span {
  uint64_t offset, size;  // bytes, from the start of the array's encoding
};

// The elements of an array of bin 8/16/32 or fixstr and str 8/16/32 (which msgpack before 1.0 wrote for bytes), in
// order. Throws std::invalid_argument where `data` is anything else, and where an element reaches beyond `size`.
std::vector<Span> byte_string_spans(const uint8_t* data, size_t size);

}  // namespace cpr
